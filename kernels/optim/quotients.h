// a / (√x + ε), each operation rounded to nearest as the processor's own are, in multiplications: where vectors of 512 bits
// are multiplied whole, its own roots and quotients keep an optimizer's memory waiting.
#pragma once

#include <cmath>

#include "vectors.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace quotients {

inline Vector by_division(Vector a, Vector x, float eps) {
    Vector root = x;
    for (int64_t l = 0; l < LANES; l++) root[l] = std::sqrt(root[l]);
    return a / (root + eps);
}

#ifdef __AVX512F__
inline Vector plus_product(Vector c, Vector a, Vector b) {
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

inline Vector less_product(Vector c, Vector a, Vector b) {
    return (Vector)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// The root of x from 2⁻¹⁰⁰ to 2¹⁰⁰: Newton's steps for √x and 1 / 2√x together, and what is left of x added to the root.
inline Vector root(Vector x) {
    const Vector about = (Vector)_mm512_rsqrt14_ps((__m512)x);  // 1 / √x to 14 bits
    Vector whole = x * about, half = about * 0.5f;
    const Vector off = less_product(all(0.5f), whole, half);
    whole = plus_product(whole, whole, off);
    half = plus_product(half, half, off);
    return plus_product(whole, less_product(x, whole, whole), half);
}

// 1 / b rounded to nearest, but where b's mantissa is all ones: Newton's steps from 14 bits to 28 and to all.
inline Vector reciprocal(Vector b) {
    Vector over = (Vector)_mm512_rcp14_ps((__m512)b);
    for (int step = 0; step < 2; step++) over = plus_product(over, over, less_product(all(1.0f), b, over));
    return over;
}

// a / b by b's reciprocal, itself rounded to nearest, and what is left of a (Markstein, IBM J. Res. Dev. 34(1), 1990, pages
// 111 to 119): for a from 2⁻⁷⁰ to 2⁶⁰, b from 2⁻⁶⁰ to 2⁵¹ whose mantissa is not all ones.
inline Vector quotient(Vector a, Vector b) {
    const Vector over = reciprocal(b);
    Vector q = a * over;
    for (int step = 0; step < 2; step++) q = plus_product(q, less_product(a, b, q), over);
    return q;
}

// Lanes of a number below 2^LOW, of 2^HIGH or above, or none.
template <int32_t LOW, int32_t HIGH>
inline __mmask16 outside(Vector v) {
    const __m512i bits = _mm512_and_epi32((__m512i)v, _mm512_set1_epi32(0x7fffffff));
    const __m512i above = _mm512_sub_epi32(bits, _mm512_set1_epi32((LOW + 127) << 23));
    return _mm512_cmpge_epu32_mask(above, _mm512_set1_epi32((HIGH - LOW) << 23));
}

inline __mmask16 all_ones(Vector b) {
    const __m512i mantissa = _mm512_set1_epi32(0x7fffff);
    return _mm512_cmpeq_epi32_mask(_mm512_and_epi32((__m512i)b, mantissa), mantissa);
}
#endif

// ε is 0 or more.
inline Vector over_root(Vector a, Vector x, float eps) {
#ifdef __AVX512F__
    if (WHOLE_VECTORS && eps < 0x1p50f && !(outside<-100, 100>(x) | outside<-70, 60>(a))) {  // not of zeros, for their sign
        const Vector b = root(x) + eps;
        if (!all_ones(b)) return quotient(a, b);
    }
#endif
    return by_division(a, x, eps);
}

}  // namespace quotients
