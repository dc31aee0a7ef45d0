"""The similarities' arithmetic: the terms of each half, or of both at once.

A function takes a component's q, a and c and returns its term and the term's derivative by q (for a
square minus half of it); the derivative by c is −a times that, unless the similarity is bilinear.
HALF is κ/2, and SCALED says whether there is an a. A coupled similarity has one function, of the
components of both halves, which returns the term and two derivatives.

To add one, write its functions and name them in ``TERMS``. Kernels read everything else about a
similarity from its descriptor in emu_kernels/similarity.py (launch.py makes a kinds.Kind of it).
"""

from __future__ import annotations

import triton.language as tl

import triton

SMALLEST = tl.constexpr(1.17549435e-38)  # below it a square counts as 0


@triton.jit
def _dot(q, a, c, HALF: tl.constexpr, SCALED: tl.constexpr):
    return q * c, c


@triton.jit
def _difference(q, a, c, SCALED: tl.constexpr):
    # The kernels are compiled without contraction: this product is rounded before it is subtracted.
    if SCALED:
        return q - a * c
    else:
        return q - c


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # 0 stays 0, and NaN stays NaN


@triton.jit
def _l1(q, a, c, HALF: tl.constexpr, SCALED: tl.constexpr):
    u = _difference(q, a, c, SCALED)
    return -tl.abs(u), -_sign(u)


@triton.jit
def _l2(q, a, c, HALF: tl.constexpr, SCALED: tl.constexpr):
    u = _difference(q, a, c, SCALED)
    return u * u, -u


@triton.jit
def _sine(q, a, c, HALF: tl.constexpr, SCALED: tl.constexpr):
    """−|sin u|, u = (q − c) κ/2."""
    u = q * HALF - c * HALF
    if u.dtype == tl.float64:
        s = tl.sin(u)
        slope = tl.cos(u) * _sign(s)
        return -tl.abs(s), -HALF * slope
    else:
        # u − nπ, π in three parts, the first short enough that n times it is exact. For |u| above
        # 2^22 numbers are half a radian or more apart, and the result is only kept in bounds.
        n = tl.floor(u * 0.318309886 + 0.5)
        r = tl.fma(-n, 3.140625, u)
        r = tl.fma(-n, 9.67502593994140625e-4, r)
        r = tl.fma(-n, 1.509957990978376432e-7, r)
        r = tl.where(tl.abs(r) > 1.6, 1.57079633, r)
        sign = _sign(r)
        s = _sine_of_reduced(tl.abs(r))
        return -s, -HALF * sign * _sine_of_reduced(1.57079633 - tl.abs(r))


@triton.jit
def _sine_of_reduced(r):
    """sin of −0.1..π/2, minimax of degree 9."""
    s = r * r
    y = 2.6083159809786593541503e-06 * s - 0.0001981069071916863322258
    y = y * s + 0.00833307858556509017944336
    y = y * s - 0.166666597127914428710938
    return r + r * (s * y)


@triton.jit
def _rotate(q0, c0, q1, c1):
    u0 = q0 - c0
    u1 = q1 - c1
    square = u0 * u0 + u1 * u1
    inverse = tl.where(square < SMALLEST, 0.0, tl.rsqrt(square))
    return -(square * inverse), -u0 * inverse, -u1 * inverse


TERMS = {
    "dot": (_dot,),
    "l1": (_l1,),
    "l2": (_l2,),
    "rotate": (_rotate,),
    "hake": (_sine, _l2),
    "protate": (_sine,),
}
"""For each half; if a similarity is coupled, one function of both."""


@triton.jit
def value(total, ROOT: tl.constexpr):
    """v(S): the sum, or minus its root."""
    if ROOT:
        return -tl.sqrt(total)
    else:
        return total


@triton.jit
def values(sums, good, kind: tl.constexpr):
    """v(S) of each sum, NaN where not good."""
    nan = float("nan")
    return [tl.where(good, value(sums[s], kind.ROOTS[s]), nan) for s in (0, 1)[: kind.SUMS]]


@triton.jit
def value_slope(v, ROOT: tl.constexpr):
    """dv/dS from v; for a root, minus the derivative by half of S."""
    if ROOT:
        return tl.where(v == 0, 0.0, -1.0 / tl.where(v == 0, 1.0, v))
    else:
        return v * 0 + 1.0


@triton.jit
def weighed(x, weights, s: tl.constexpr):
    """x times the weight of a sum."""
    if weights is None:
        return x
    else:
        return x * tl.load(weights + s).to(x.dtype)


@triton.jit
def combine(v, weights, kind: tl.constexpr):
    """The score Σ_s w_s v_s."""
    score = weighed(v[0], weights, 0)
    if kind.SUMS == 2:
        score += weighed(v[1], weights, 1)
    return score


@triton.jit
def moments(means, variances, kind: tl.constexpr):
    """Mean and variance of each sum's v(S) from those of S; for a root by the delta method."""
    both = [_moments(means[s], variances[s], kind.ROOTS[s]) for s in (0, 1)[: kind.SUMS]]
    return [x[0] for x in both], [x[1] for x in both]


@triton.jit
def _inverse_root(x):
    """1/√x; 0 for 0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.sqrt(tl.where(x == 0, 1.0, x)))


@triton.jit
def _moments(mean, variance, ROOT: tl.constexpr):
    if ROOT:
        r = _inverse_root(mean)
        v = variance * r * r * 0.25
        return 0.5 * v * r - tl.sqrt(mean), v
    else:
        return mean, variance


@triton.jit
def cumulant(mean, v, weights, kind: tl.constexpr):
    """The score's mean and half its variance, Σ_s w_s² v_s / 2."""
    half = weighed(weighed(0.5 * v[0], weights, 0), weights, 0)
    if kind.SUMS == 2:
        half += weighed(weighed(0.5 * v[1], weights, 1), weights, 1)
    return mean + half


@triton.jit
def moment_slopes(by_mean, by_half, means, variances, weights, kind: tl.constexpr):
    """Weights of each sum's mean and variance from those of the score's mean and half variance:
    derivatives by the sum's mean and half its variance (for a root both times −2)."""
    both = [
        _moment_slopes(
            weighed(by_mean, weights, s), weighed(weighed(by_half, weights, s), weights, s),
            means[s], variances[s], kind.ROOTS[s],
        )
        for s in (0, 1)[: kind.SUMS]
    ]  # fmt: skip
    return [x[0] for x in both], [x[1] for x in both]


@triton.jit
def _moment_slopes(a, b, mean, variance, ROOT: tl.constexpr):
    if ROOT:
        r = _inverse_root(mean)
        z = variance * r * r * 0.25 * r * r
        return a * r * (1.0 + 1.5 * z) + b * z, -0.5 * r * r * (a * r + b)
    else:
        return a, b


@triton.jit
def slopes(v, weights, kind: tl.constexpr):
    """∂score/∂S of each sum; for a root as in value_slope."""
    return [weighed(value_slope(v[s], kind.ROOTS[s]), weights, s) for s in (0, 1)[: kind.SUMS]]
