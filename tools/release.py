"""Check that tree, sdist and the wheels in dist/ can be released: ``make release-check``."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def found(pattern: str, file: str) -> str:
    match = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return match[1] if match else "nothing"


def check_versions(version: str) -> None:
    for file, pattern in (
        ("CITATION.cff", r"^version: (\S+)$"),
        ("CHANGELOG.md", r"^## (\S+), \d{4}-\d\d-\d\d$"),
    ):
        if found(pattern, file) != version:
            raise SystemExit(f"the version is {version}, {file} has {found(pattern, file)}")
    day = found(r"^## \S+, (\S+)$", "CHANGELOG.md")
    if found(r"^date-released: (\S+)$", "CITATION.cff") != day:
        raise SystemExit(f"CHANGELOG.md says {day}, the date of CITATION.cff is another")


def check_tree() -> None:
    if changed := run("git", "status", "--porcelain"):
        raise SystemExit(f"not committed:\n{changed}")


def check_sdist(version: str) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST)
    sdist = DIST / f"emu_kernels-{version}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = run("git", "ls-files", "csrc", "emu_kernels", "triton/kernels").split()
    needed += ["CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"]
    if absent := sorted(set(needed) - names):
        raise SystemExit(f"not in {sdist.name}: {', '.join(absent)}")
    return sdist


def check_wheels(version: str) -> list[Path]:
    wheels = sorted(DIST.glob(f"emu_kernels-{version}-*.whl"))
    if not wheels:
        raise SystemExit(f"no wheel of {version} in {DIST}: make wheel")
    for wheel in wheels:
        said = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
        tag = re.search(r'following platform tag: "([^"]+)"', said)
        if not tag or not tag[1].startswith("manylinux_2_"):
            raise SystemExit(said)
        print(f"{wheel.name}: {tag[1]}, {wheel.stat().st_size / 1e6:.1f} MB")
    return wheels


def main() -> None:
    version = found(r'__version__ = "(.+)"', "emu_kernels/_version.py")
    check_versions(version)
    check_tree()
    files = [check_sdist(version), *check_wheels(version)]
    print(run(sys.executable, "-m", "twine", "check", "--strict", *files), end="")
    print(f"{version} can be released: git tag v{version}")


if __name__ == "__main__":
    main()
