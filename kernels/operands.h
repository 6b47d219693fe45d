// What a product takes: floats as they are, or rounded to bfloat16, with sums in float32 either way. Where the processor
// multiplies pairs of bfloat16 numbers, a number of a packed operand is such a pair: two neighbours in depth.
#pragma once

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct Exact {
    static constexpr int64_t STEP = 1;  // terms of a sum that a number holds
    typedef float Number;
    typedef Vector Numbers;

    static Numbers spread(float a) { return all(a); }
    static Vector add(Vector sum, Numbers a, Numbers b) { return sum + a * b; }
    // Numbers of (first, second) in depth; of neighbours in memory; and one alone.
    static Numbers made(Vector first, Vector) { return first; }
    static Numbers row(const float *from) { return load(from); }
    static float made(float first, float) { return first; }
};

#ifdef __AVX512BF16__
// What is not normal is zero, in operands and sums.
struct Rounded {
    static constexpr int64_t STEP = 2;
    typedef uint32_t Number;
    typedef uint32_t Numbers __attribute__((vector_size(LANES * sizeof(uint32_t))));

    static Numbers spread(uint32_t a) { return a | Numbers{}; }
    static Vector add(Vector sum, Numbers a, Numbers b) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    static Numbers made(Vector first, Vector second) {
        typedef uint16_t Halves __attribute__((vector_size(64)));
        const Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (Numbers)_mm512_permutexvar_epi16((__m512i)order, (__m512i)side_by_side(first, second));
    }
    static Numbers row(const float *from) { return side_by_side(load(from), load(from + LANES)); }
    static uint32_t made(float first, float second) { return made(Vector{first}, Vector{second})[0]; }

  private:
    static Numbers side_by_side(Vector first, Vector second) {
        return (Numbers)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    }
};
#else
struct Rounded {
    static constexpr int64_t STEP = 1;
    typedef float Number;
    typedef Vector Numbers;

    static Numbers spread(float a) { return all(a); }
    static Vector add(Vector sum, Numbers a, Numbers b) { return sum + a * b; }
    // To the nearest, ties to even; what is not a number stays so.
    static Numbers made(Vector v, Vector) {
        typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
        Bits bits;
        std::memcpy(&bits, &v, sizeof v);
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
        Vector near;
        std::memcpy(&near, &bits, sizeof v);
        return v != v ? v : near;
    }
    static Numbers row(const float *from) { return made(load(from), Vector{}); }
    static float made(float first, float) { return made(Vector{first}, Vector{})[0]; }
};
#endif

// Numbers that hold so many terms of a sum; the last one's second term may be zero.
template <typename Kind>
static inline int64_t numbers_of(int64_t terms) {
    return (terms + Kind::STEP - 1) / Kind::STEP;
}

// `depth` floats that lie side by side, as so many terms of a sum.
template <typename Kind>
static inline void pack_row(const float *from, int64_t depth, typename Kind::Number *to) {
    const int64_t count = numbers_of<Kind>(depth);
    int64_t n = 0;
    for (; (n + LANES) * Kind::STEP <= depth; n += LANES) {
        const auto made = Kind::row(from + n * Kind::STEP);
        std::memcpy(to + n, &made, sizeof made);
    }
    for (; n < count; n++) {
        const int64_t last = n * Kind::STEP + Kind::STEP - 1;
        to[n] = Kind::made(from[n * Kind::STEP], last < depth ? from[last] : 0.0f);
    }
}
