"""Standard normal numbers from random words, the same to the last bit on every machine.

    z = Φ⁻¹((w + ½) · 2⁻³²)        w a word, 0 ≤ w < 2³²

Φ⁻¹ is Wichura's algorithm AS 241 (Applied Statistics 37, 1988) in float64, exact to about 1 part in 10¹⁵. It is made of
+, −, ·, / and √ alone, which IEEE 754 defines to the last bit; the logarithm, which it does not define, is made of them
here too. (A library's log, sin and cos change with its version and with the processor.) |z| is at most 6.2.
"""

import numpy as np
import numpy.typing as npt

from loramux_adapters.posterior.philox import Words

Floats = npt.NDArray[np.float64]

_SPLIT, _CENTRE, _TAIL = 0.425, 0.180625, 1.6
# Numerators and denominators, highest power first; both denominators end in 1.
_CENTRAL = (
    (
        2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
        13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.3871328727963666080,
    ),
    (
        5226.4952788528545610, 28729.085735721942674, 39307.895800092710610, 21213.794301586595867,
        5394.1960214247511077, 687.18700749205790830, 42.313330701600911252, 1.0,
    ),
)  # fmt: skip
_OUTER = (
    (
        7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258,
        3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734,
    ),
    (
        1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
        6.89767334985100004550e-1, 1.67638483018380384940, 2.05319162663775882187, 1.0,
    ),
)  # fmt: skip
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
# 2·atanh(s) = log((1 + s) / (1 − s)): at |s| ≤ 0.172 what is left out after s²¹ is below 1e-17.
_ATANH = tuple(2.0 / power for power in range(21, 0, -2))


def standard_normal(words: Words) -> Floats:
    """z of every word. Words w and 2³² − 1 − w give z and −z."""
    q = (words.astype(np.float64) - 2147483647.5) * 2.0**-32
    r = _CENTRE - q * q
    z: Floats = q * (_horner(_CENTRAL[0], r) / _horner(_CENTRAL[1], r))
    outer = np.abs(q) > _SPLIT
    q = q[outer]
    r = np.sqrt(-_log(0.5 - np.abs(q))) - _TAIL
    z[outer] = np.where(q < 0, -1.0, 1.0) * (_horner(_OUTER[0], r) / _horner(_OUTER[1], r))
    return z


def _log(x: Floats) -> Floats:
    """The natural logarithm of positive numbers."""
    m, exponent = np.frexp(x)
    low = m < _SQRT_HALF
    m, exponent = np.where(low, 2 * m, m), exponent - low
    s = (m - 1) / (m + 1)
    logarithm: Floats = exponent * _LN2 + s * _horner(_ATANH, s * s)
    return logarithm


def _horner(coefficients: tuple[float, ...], x: Floats) -> Floats:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value
