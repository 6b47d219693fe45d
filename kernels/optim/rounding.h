// bfloat16 numbers, rounded to nearest or stochastically: rounding.py says by which words.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace rounding {

typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

inline Words bits_of(Vector v) {
    Words bits;
    std::memcpy(&bits, &v, sizeof v);
    return bits;
}

inline Words widened(Halves half) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32((__m256i)half);  // which compilers make of two halves, where left to it
#else
    return __builtin_convertvector(half, Words);
#endif
}

inline Halves narrowed(Words word) {
#ifdef __AVX512F__
    return (Halves)_mm512_cvtepi32_epi16((__m512i)word);
#else
    return __builtin_convertvector(word, Halves);
#endif
}

inline Vector read(const uint16_t *from, int64_t left) {
    Halves half{};
    if (left >= LANES)
        std::memcpy(&half, from, sizeof half);
    else
        for (int64_t i = 0; i < left; i++) half[i] = from[i];
    const Words bits = widened(half) << 16;
    Vector v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// The upper halves of v's bits after `added`; what is not a number becomes the one of 0x7fc0.
inline void write(uint16_t *to, Vector v, Words added, int64_t left) {
    const Halves half = narrowed(v != v ? Words{} + 0x7fc0 : (bits_of(v) + added) >> 16);
    if (left >= LANES)
        std::memcpy(to, &half, sizeof half);
    else
        for (int64_t i = 0; i < left; i++) to[i] = half[i];
}

inline Words to_nearest(Vector v) { return 0x7fff + (bits_of(v) >> 16 & 1); }  // ties to even

// What the words of a tensor depend on.
struct Stream {
    uint64_t seed, first;  // the place of the tensor's first number in its whole
    uint32_t step, stream;
};

// Both halves of a · by.
inline void product(Words a, uint32_t by, Words &high, Words &low) {
#ifdef __AVX512F__
    // Lanes are brought together by shuffles, since the products alone keep their unit busy
    constexpr auto UPPER = static_cast<_MM_PERM_ENUM>(0xf5), LOWER = static_cast<_MM_PERM_ENUM>(0xa0);
    const __m512i factor = _mm512_set1_epi32(by), wide = (__m512i)a;
    const __m512i even = _mm512_mul_epu32(wide, factor), odd = _mm512_mul_epu32(_mm512_shuffle_epi32(wide, UPPER), factor);
    high = (Words)_mm512_mask_shuffle_epi32(odd, 0x5555, even, UPPER);
    low = (Words)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, LOWER);
#else
    for (int64_t l = 0; l < LANES; l++) high[l] = static_cast<uint64_t>(a[l]) * by >> 32;
    low = a * by;
#endif
}

// Of each four lanes of a and b those that lie in the lower (FROM 0) or upper (2) two, in turn or one pair behind the other.
template <int64_t FROM, bool IN_TURN>
constexpr int lane_of(int64_t j) {
    const int64_t quad = j / 4 * 4, i = j % 4;
    return IN_TURN ? quad + FROM + i / 2 + i % 2 * LANES : quad + FROM + i % 2 + i / 2 * LANES;
}

template <int64_t FROM, bool IN_TURN, int64_t... J>
inline Words mixed(Words a, Words b, std::integer_sequence<int64_t, J...>) {
    return __builtin_shufflevector(a, b, lane_of<FROM, IN_TURN>(J)...);
}

template <int64_t FROM, bool IN_TURN>
inline Words mixed(Words a, Words b) {
    return mixed<FROM, IN_TURN>(a, b, std::make_integer_sequence<int64_t, LANES>{});
}

constexpr int64_t DRAWN = 4 * LANES;  // words that are made at once

// The words of the DRAWN numbers from place 4 · quad on, in their order.
inline void draw(uint32_t *to, uint64_t quad, const Stream &s) {
    // Lane 4q + r has counter LANES / 4 · r + q, so that transposing quads of lanes brings the words in order
    Words c0, c1, c2 = Words{} + s.step, c3 = Words{} + s.stream;
    for (int64_t l = 0; l < LANES; l++) c0[l] = LANES / 4 * (l % 4) + l / 4;
    const uint32_t low = static_cast<uint32_t>(quad);
    c0 += low;
    c1 = static_cast<uint32_t>(quad >> 32) - (Words)(c0 < low);  // a comparison that holds is -1
    uint32_t k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
    for (int round = 0; round < 10; round++) {
        Words high0, low0, high1, low1;
        product(c0, 0xD2511F53, high0, low0);
        product(c2, 0xCD9E8D57, high1, low1);
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    const Words a = mixed<0, true>(c0, c1), b = mixed<0, true>(c2, c3);
    const Words c = mixed<2, true>(c0, c1), d = mixed<2, true>(c2, c3);
    const Words in_order[4] = {mixed<0, false>(a, b), mixed<2, false>(a, b), mixed<0, false>(c, d), mixed<2, false>(c, d)};
    std::memcpy(to, in_order, sizeof in_order);
}

// The words of some neighbouring numbers, made some hundred at a time.
class Row {
  public:
    static constexpr int64_t LENGTH = 4 * DRAWN;

    // From the tensor's number `at` on; LENGTH of them.
    void move_to(int64_t at, const Stream &s) {
        const uint64_t place = s.first + at;
        ahead = place % 4;
        for (int64_t i = 0; i < LENGTH + (ahead ? DRAWN : 0); i += DRAWN) draw(words + i, (place + i) / 4, s);
    }

    Words operator[](int64_t i) const {
        Words w;
        std::memcpy(&w, words + ahead + i, sizeof w);
        return w;
    }

  private:
    alignas(64) uint32_t words[LENGTH + DRAWN];
    int64_t ahead = 0;
};

}  // namespace rounding
