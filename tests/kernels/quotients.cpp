// How many results of optim/quotients.h are not those of the processor's own operations, to the bit. Without vectors of
// 512 bits none is asked.
#include "optim/quotients.h"

namespace {

uint32_t bits_of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof v);
    return bits;
}

float float_of(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

int64_t unlike(Vector got, Vector wanted) {
    int64_t count = 0;
    for (int64_t l = 0; l < LANES; l++)
        count += bits_of(got[l]) != bits_of(wanted[l]) && !(got[l] != got[l] && wanted[l] != wanted[l]);
    return count;
}

// A row of numbers: of an exponent those whose mantissa follows `mantissa`.
Vector row(uint32_t exponent, uint32_t mantissa) {
    Vector v;
    for (int64_t l = 0; l < LANES; l++) v[l] = float_of(exponent << 23 | (mantissa + l));
    return v;
}

}  // namespace

// Of every mantissa, twice: with an even and an odd exponent.
extern "C" int64_t roots(int64_t) {
    int64_t count = 0;
#ifdef __AVX512F__
    for (uint32_t exponent = 127; exponent <= 128; exponent++)
        for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += LANES) {
            const Vector x = row(exponent, mantissa);
            Vector wanted;
            for (int64_t l = 0; l < LANES; l++) wanted[l] = std::sqrt(x[l]);
            count += unlike(quotients::root(x), wanted);
        }
#endif
    return count;
}

// Of every mantissa but the one that is all ones.
extern "C" int64_t reciprocals(int64_t) {
    int64_t count = 0;
#ifdef __AVX512F__
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += LANES) {
        Vector b = row(127, mantissa);
        if (quotients::all_ones(b)) b[LANES - 1] = 1;
        count += unlike(quotients::reciprocal(b), 1.0f / b);
    }
#endif
    return count;
}

// What the optimizer asks for: a and x, `rows` vectors of each.
extern "C" int64_t over_roots(const float *a, const float *x, int64_t rows, double eps, int64_t) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows * LANES; i += LANES) {
        const Vector above = load(a + i), below = load(x + i);
        const float added = static_cast<float>(eps);
        count += unlike(quotients::over_root(above, below, added), quotients::by_division(above, below, added));
    }
    return count;
}
