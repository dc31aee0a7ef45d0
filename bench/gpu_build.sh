# sh bench/gpu_build.sh PYTHON INTO WORK: compile the extension modules into a folder, by CMake alone, and link the
# Triton kernels where that is the package itself. CMAKE_ARGS goes to CMake's configure step.
#
# `pip install --editable .` does the same, but needs a setuptools that knows this repository's pyproject.toml, which
# a GPU's machine without a network may not have.
set -e
python=$1 work=$3
mkdir -p "$2"
into=$(cd "$2" && pwd)
PATH=$PATH:$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
pybind11=$("$python" -m pybind11 --cmakedir)
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' emu_kernels/_version.py)
cmake -S . -B "$work" $(command -v ninja >/dev/null && echo -G Ninja) -DCMAKE_BUILD_TYPE=Release \
	-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$into" -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$pybind11" \
	-DEMU_VERSION="$version" $CMAKE_ARGS
cmake --build "$work" --parallel "$(nproc)"
if [ "$into" = "$PWD/emu_kernels" ] && [ ! -e emu_kernels/triton ]; then
	ln -s ../triton/kernels emu_kernels/triton
fi
