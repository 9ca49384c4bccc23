/* What the examples check against: conversions, random data and attention in float64, written to be read. */
#ifndef EXAMPLES_NUMERIC_H
#define EXAMPLES_NUMERIC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "check.h"

/* IEEE binary16 to double, exact. */
static inline double half_to_double(uint16_t half)
{
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double value;
    if (exponent == 31)
        value = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        value = ldexp(fraction, -24);
    else
        value = ldexp(1024 + fraction, exponent - 25);
    return half >> 15 ? -value : value;
}

/* double to IEEE binary16, to nearest, ties to even; for values below 65504. */
static inline uint16_t double_to_half(double value)
{
    int exponent;
    unsigned sign = signbit(value) ? 0x8000u : 0u, bits = 0;
    double fraction = frexp(fabs(value), &exponent);
    if (fraction != 0.0 && exponent < -13) /* below 2^-14: subnormal */
        bits = (unsigned)nearbyint(ldexp(fraction, exponent + 24));
    else if (fraction != 0.0) /* a carry out of the fraction raises the exponent, as it should */
        bits = ((unsigned)(exponent + 13) << 10) + (unsigned)nearbyint(ldexp(fraction, 11));
    return (uint16_t)(sign | bits);
}

/* Uniform in (-1, 1), the same on every machine (splitmix64). */
static inline double random_unit(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    z ^= z >> 31;
    return (double)(z >> 11) * 0x1p-52 - 1.0;
}

/* One row of attention in float64: its output, its log-sum-exp, and what the error bounds are made of. */
typedef struct {
    double maximum;      /* of the scores */
    double sum;          /* of exp(score - maximum) */
    double magnitude;    /* max over keys of scale * sum |q_i k_i| */
    double out[256];     /* sum of weight * v, then normalised */
    double absolute[256]; /* the same with |v| */
} row_t;

static inline void row_begin(row_t *row)
{
    memset(row, 0, sizeof *row);
    row->maximum = -INFINITY;
}

/* Takes in one key and its value. `dim` is at most 256. */
static inline void row_add(row_t *row, const double *q, const double *k, const double *v, int dim, double scale)
{
    double score = 0.0, magnitude = 0.0, weight;
    int i;
    for (i = 0; i < dim; i++) {
        score += q[i] * k[i];
        magnitude += fabs(q[i] * k[i]);
    }
    score *= scale;
    if (magnitude * scale > row->magnitude)
        row->magnitude = magnitude * scale;
    if (score > row->maximum) {
        double shrink = exp(row->maximum - score);
        row->sum *= shrink;
        for (i = 0; i < dim; i++) {
            row->out[i] *= shrink;
            row->absolute[i] *= shrink;
        }
        row->maximum = score;
    }
    weight = exp(score - row->maximum);
    row->sum += weight;
    for (i = 0; i < dim; i++) {
        row->out[i] += weight * v[i];
        row->absolute[i] += weight * fabs(v[i]);
    }
}

/* Normalises. No key at all: zeros, and -inf from row_lse. */
static inline void row_end(row_t *row, int dim)
{
    int i;
    for (i = 0; i < dim && row->sum > 0.0; i++) {
        row->out[i] /= row->sum;
        row->absolute[i] /= row->sum;
    }
}

static inline double row_lse(const row_t *row)
{
    return row->sum > 0.0 ? row->maximum + log(row->sum) : -INFINITY;
}

/* The library's promise for element i of an fp32 output, against float64:
 *     |error| <= c * sum w |v|,    c = 2^-24 (4 + 2 max scale sum |q k|)
 * and for the lse 4 ulp of max(1, |lse|, max scale sum |q k|). The rounding of the fp32 result itself is in c. */
static inline double out_bound(const row_t *row, int i)
{
    return 0x1p-24 * (4.0 + 2.0 * row->magnitude) * row->absolute[i];
}

static inline double lse_bound(const row_t *row)
{
    double size = fmax(fmax(1.0, fabs(row_lse(row))), row->magnitude);
    int exponent;
    frexp(size, &exponent);
    return 4.0 * ldexp(1.0, exponent - 24);
}

/* The worst errors seen so far. */
typedef struct {
    double out, lse;             /* largest absolute errors */
    double out_share, lse_share; /* the same as a share of the bound: above 1 a promise is broken */
} worst_t;

/* A NaN or an infinite difference counts as infinitely wrong. */
static inline void worst_add(double *largest, double *share, double got, double want, double bound)
{
    double error = got == want ? 0.0 : fabs(got - want);
    double part = error == 0.0 ? 0.0 : error / bound;
    if (!isfinite(error))
        error = part = INFINITY;
    *largest = fmax(*largest, error);
    *share = fmax(*share, part);
}

/* Takes in one row of results: `out` of `dim` floats and its lse. */
static inline void worst_row(worst_t *worst, const row_t *row, const float *out, float lse, int dim)
{
    int i;
    for (i = 0; i < dim; i++)
        worst_add(&worst->out, &worst->out_share, out[i], row->out[i], out_bound(row, i));
    if (isinf(row_lse(row)))
        REQUIRE(isinf(lse) && lse < 0, "an empty row has lse -inf, found %g", lse);
    else
        worst_add(&worst->lse, &worst->lse_share, lse, row_lse(row), lse_bound(row));
}

/* 0 and a line if every bound held, 1 and a complaint if not: the end of an example. */
static inline int worst_verdict(const worst_t *worst)
{
    if (worst->out_share <= 1.0 && worst->lse_share <= 1.0) {
        printf("ok: every output is within its bound (largest share of it used: out %.2f, lse %.2f)\n",
               worst->out_share, worst->lse_share);
        return 0;
    }
    printf("FAILED: a bound is broken (out %.2f of it, lse %.2f of it)\n", worst->out_share, worst->lse_share);
    return 1;
}

#endif
