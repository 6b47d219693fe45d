// The output head and its cross-entropy: products, softmax and slope of a block of the head's rows at a time, in a cache.
//
// Logits lie as (vocabulary, rows), rows being those of a chunk: then a vector holds one logit of many rows, the softmax
// takes no sums across lanes, and each of the three products finds its operands in the order in which it reads them:
//
//     logits (v, r)  = Σ_d  w(v, d) · x(r, d)         w as it lies,       x in panels of its transpose
//     grad_x (d, r) += Σ_v  w(v, d) · slope(v, r)     w in panels,        the slope as it lies
//     grad_w (v, d) += Σ_r  slope(v, r) · x(r, d)     slope as it lies,   x in panels
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

namespace {

constexpr int64_t TALL = 6, WIDE = 2 * LANES;  // of a product's tile, whose sums stay in registers
constexpr int64_t BLOCK = 16 * TALL;           // rows of the head at a time
constexpr int64_t DEPTH = 256;                 // terms of a logit at a time: a panel of x stays in the first cache
constexpr int64_t SPAN = 64 * TALL;            // columns of the head at a time in the gradients

int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

struct Freed {
    void operator()(float *at) const { ::operator delete[](at, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Freed>;

Floats floats(int64_t count) {
    return Floats(static_cast<float *>(::operator new[](count * sizeof(float), std::align_val_t(64))));
}

struct Tile {
    Vector at[TALL][2];
};

// tile(i, j) = Σ_k a[i · row + k · step] · b[k · pitch + j]
inline __attribute__((always_inline)) Tile product(
    const float *a, int64_t row, int64_t step, const float *b, int64_t pitch, int64_t depth
) {
    Tile tile{};
    for (int64_t k = 0; k < depth; k++, a += step, b += pitch) {
        const Vector left = load(b), right = load(b + LANES);
#pragma GCC unroll 6
        for (int64_t i = 0; i < TALL; i++) {
            tile.at[i][0] += left * a[i * row];
            tile.at[i][1] += right * a[i * row];
        }
    }
    return tile;
}

inline void put(const Tile &tile, float *to, int64_t pitch) {
    for (int64_t i = 0; i < TALL; i++)
        for (int64_t half = 0; half < 2; half++) store(to + i * pitch + half * LANES, tile.at[i][half]);
}

inline void add(const Tile &tile, float *to, int64_t pitch) {
    for (int64_t i = 0; i < TALL; i++)
        for (int64_t half = 0; half < 2; half++) {
            float *place = to + i * pitch + half * LANES;
            store(place, load(place) + tile.at[i][half]);
        }
}

// The part of a tile that lies within the matrix.
inline void add_part(const Tile &tile, float *to, int64_t pitch, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[i * pitch + j] += tile.at[i][j / LANES][j % LANES];
}

struct Head {
    const float *x, *w;
    int64_t width, vocab;
    float inverse_temperature;
};

// Rows of x that are taken at once, and what is made of them.
struct Chunk {
    int64_t first, rows, pitch;    // pitch: the rows filled up to whole tiles, with zeros
    int64_t slope_pitch;           // an odd number of lines of a cache, so that a column of them does not evict itself
    const float *across, *along;   // x / temperature: panels of WIDE rows, column by column; of WIDE columns, row by row
    const float *highest, *scale;  // of each row: the largest logit, and weight / sum of the exponentials
};

void pack_across(const Head &head, int64_t first, int64_t rows, int64_t panel, float *to) {
    to += panel * WIDE * head.width;
    for (int64_t j = 0; j < WIDE; j++) {
        const int64_t row = panel * WIDE + j;
        const float *x = head.x + (first + row) * head.width;
        for (int64_t d = 0; d < head.width; d++) to[d * WIDE + j] = row < rows ? x[d] * head.inverse_temperature : 0.0f;
    }
}

void pack_along(const Head &head, int64_t first, int64_t rows, int64_t panel, float *to) {
    to += panel * WIDE * rows;
    const int64_t begin = panel * WIDE, columns = std::min(WIDE, head.width - begin);
    for (int64_t row = 0; row < rows; row++, to += WIDE) {
        const float *x = head.x + (first + row) * head.width + begin;
        for (int64_t j = 0; j < WIDE; j++) to[j] = j < columns ? x[j] * head.inverse_temperature : 0.0f;
    }
}

// Logits of `count` rows of the head from v on, (count filled up to TALL, pitch). A tile that would begin too late to
// be full reads the last rows of the head again, whose logits nobody looks at.
void logits(const Head &head, const Chunk &chunk, int64_t v, int64_t count, float *to) {
    int64_t d = 0;
    do {  // once without any columns, too: then they are zero
        const int64_t depth = std::min(DEPTH, head.width - d);
        for (int64_t r = 0; r < chunk.pitch; r += WIDE) {
            const float *x = chunk.across + r * head.width + d * WIDE;
            for (int64_t i = 0; i < count; i += TALL) {
                const float *w = head.w + (v + i) * head.width + d;
                float *place = to + i * chunk.pitch + r;
                float last[TALL * DEPTH];
                int64_t row = head.width;
                if (i + TALL > count) {
                    row = DEPTH;
                    for (int64_t k = 0; k < TALL; k++)
                        std::copy_n(w + std::min(k, count - i - 1) * head.width, depth, last + k * DEPTH);
                    w = last;
                }
                const Tile tile = product(w, row, 1, x, WIDE, depth);
                if (d == 0)
                    put(tile, place, chunk.pitch);
                else
                    add(tile, place, chunk.pitch);
            }
        }
    } while ((d += DEPTH) < head.width);
}

// The maximum and the sum of exponentials of each row, those of a block added to those before it.
void statistics(const float *z, int64_t count, int64_t pitch, float *highest, float *total) {
    for (int64_t r = 0; r < pitch; r += LANES) {
        const Vector before = load(highest + r);
        Vector most = before;
        for (int64_t v = 0; v < count; v++) most = larger(load(z + v * pitch + r), most);
        const Vector shift = most == -INFINITY ? all(0.0f) : most;  // minus infinity from itself is not a number
        Vector added{};
        for (int64_t v = 0; v < count; v++) added += exponential(load(z + v * pitch + r) - shift);
        store(highest + r, most);
        store(total + r, load(total + r) * exponential(before - shift) + added);
    }
}

// weight · (softmax − onehot)
void slopes(
    const Chunk &chunk, const int64_t *target, const float *weight, const float *z, int64_t v, int64_t count, float *to
) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < chunk.pitch; r += LANES) {
            const Vector p = exponential(load(z + i * chunk.pitch + r) - load(chunk.highest + r));
            store(to + i * chunk.slope_pitch + r, p * load(chunk.scale + r));
        }
    for (int64_t r = 0; r < chunk.rows; r++) {
        const int64_t row = target[chunk.first + r] - v;
        if (row >= 0 && row < count) to[row * chunk.slope_pitch + r] -= weight[chunk.first + r];
    }
}

// What a block of the head's rows adds to the gradient of x, transposed and of a part of the columns, (span, pitch).
void add_to_grad_x(
    const Head &head, const Chunk &chunk, const float *slope, int64_t v, int64_t count, int64_t d, int64_t span,
    float *panels, float *grad_x
) {
    for (int64_t i = 0; i < count; i++) {
        const float *w = head.w + (v + i) * head.width + d;
        float *panel = panels + i * TALL;
        for (int64_t j = 0; j < span; j += TALL, panel += TALL * count)
            if (j + TALL <= span)
                std::memcpy(panel, w + j, TALL * sizeof(float));
            else
                for (int64_t k = 0; k < TALL; k++) panel[k] = j + k < span ? w[j + k] : 0.0f;
    }
    for (int64_t r = 0; r < chunk.pitch; r += WIDE)
        for (int64_t j = 0; j < span; j += TALL) {
            const Tile tile = product(panels + j * count, 1, TALL, slope + r, chunk.slope_pitch, count);
            add(tile, grad_x + (d + j) * chunk.pitch + r, chunk.pitch);
        }
}

// What a chunk adds to the gradient of a block of the head's rows, of a part of the columns.
void add_to_grad_w(
    const Head &head, const Chunk &chunk, const float *slope, int64_t v, int64_t count, int64_t d, int64_t span,
    float *grad_w
) {
    for (int64_t j = d; j < d + span; j += WIDE) {
        const int64_t columns = std::min(WIDE, head.width - j);
        const float *x = chunk.along + j * chunk.rows;
        for (int64_t i = 0; i < count; i += TALL) {
            float *place = grad_w + (v + i) * head.width + j;
            const int64_t rows = std::min(TALL, count - i);
            for (int64_t k = 0; k < rows; k++) __builtin_prefetch(place + k * head.width, 1);
            const Tile tile = product(slope + i * chunk.slope_pitch, chunk.slope_pitch, 1, x, WIDE, chunk.rows);
            if (rows == TALL && columns == WIDE)
                add(tile, place, head.width);
            else
                add_part(tile, place, head.width, rows, columns);
        }
    }
}

// One of `parts` of the vocabulary, which begin at whole tiles.
struct Part {
    int64_t begin, end;
    Part(int64_t vocab, int64_t part, int64_t parts) {
        const int64_t tiles = (vocab + TALL - 1) / TALL;
        begin = tiles * part / parts * TALL;
        end = std::min(vocab, tiles * (part + 1) / parts * TALL);
    }
};

// The softmax of a part of the vocabulary: each row's largest logit, sum of exponentials and, where its target is in
// this part, the target's logit. Logits stay in `held`, or are gone with their block where that is null.
void softmax_part(
    const Head &head, const Chunk &chunk, const Part &part, const int64_t *target, float *held, float *block,
    float *highest, float *total, float *aimed
) {
    std::fill_n(highest, chunk.pitch, -INFINITY);
    std::fill_n(total, chunk.pitch, 0.0f);
    for (int64_t v = part.begin; v < part.end; v += BLOCK) {
        const int64_t count = std::min(BLOCK, part.end - v);
        float *z = held ? held + v * chunk.pitch : block;
        logits(head, chunk, v, count, z);
        statistics(z, count, chunk.pitch, highest, total);
        for (int64_t r = 0; r < chunk.rows; r++) {
            const int64_t row = target[chunk.first + r] - v;
            if (row >= 0 && row < count) aimed[r] = z[row * chunk.pitch + r];
        }
    }
}

// What a part of the vocabulary gives to grad_x, transposed, (width filled up to TALL, pitch), and its rows of grad_w.
void gradient_part(
    const Head &head, const Chunk &chunk, const Part &part, const int64_t *target, const float *weight,
    const float *held, float *block, float *panels, float *grad_x, float *grad_w
) {
    std::fill_n(grad_x, up_to(head.width, TALL) * chunk.pitch, 0.0f);
    for (int64_t v = part.begin; v < part.end; v += BLOCK) {
        const int64_t count = std::min(BLOCK, part.end - v);
        slopes(chunk, target, weight, held + v * chunk.pitch, v, count, block);
        for (int64_t d = 0; d < head.width; d += SPAN) {
            const int64_t span = std::min(SPAN, head.width - d);
            add_to_grad_x(head, chunk, block, v, count, d, span, panels, grad_x);
            add_to_grad_w(head, chunk, block, v, count, d, span, grad_w);
        }
    }
}

// What the parts found of row r, as one: the largest logit and the sum of exponentials.
struct Softmax {
    float highest = -INFINITY, total = 0;
    Softmax(const float *part_highest, const float *part_total, int64_t parts, int64_t most, int64_t r) {
        for (int64_t part = 0; part < parts; part++) highest = std::max(highest, part_highest[part * most + r]);
        for (int64_t part = 0; part < parts; part++)
            total += part_total[part * most + r] * std::exp(part_highest[part * most + r] - highest);
    }
};

}  // namespace

// The loss of each row, −log softmax(x·wᵀ / temperature) at its target; and the gradients of Σ weight · loss, that of w
// added to what is there, unless `held` is null. `most` rows, a whole number of tiles, are taken at once, and their
// logits stay in `held`, (vocab filled up to TALL, most). Each thread takes a part of the vocabulary.
extern "C" void cross_entropy(
    const float *x, const float *w, const int64_t *target, const float *weight, int64_t rows, int64_t width,
    int64_t vocab, double inverse_temperature, int64_t most, float *held, float *loss, float *grad_x, float *grad_w,
    int64_t threads
) {
    const Head head{x, w, width, vocab, static_cast<float>(inverse_temperature)};
    const int64_t panels = up_to(width, WIDE) / WIDE, transposed = held ? up_to(width, TALL) * most : 0;
    const Floats across = floats(most * width), along = floats(most * panels * WIDE);
    const Floats part_highest = floats(threads * most), part_total = floats(threads * most);
    const Floats aimed = floats(most), part_grad_x = floats(threads * transposed);
#pragma omp parallel num_threads(threads)
    {
        const Floats block = floats(BLOCK * (most + WIDE)), spans = floats(BLOCK * SPAN);
        const Floats highest = floats(most), scale = floats(most);  // in each thread, which saves waiting
        for (int64_t first = 0; first < rows; first += most) {
            const int64_t count = std::min(most, rows - first), pitch = up_to(count, WIDE);
            const Chunk chunk{first, count, pitch, pitch | WIDE, across.get(), along.get(), highest.get(), scale.get()};
#pragma omp for schedule(static) nowait
            for (int64_t panel = 0; panel < pitch / WIDE; panel++) pack_across(head, first, count, panel, across.get());
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels; panel++) pack_along(head, first, count, panel, along.get());
#pragma omp for schedule(static, 1)
            for (int64_t part = 0; part < threads; part++)
                softmax_part(
                    head, chunk, {vocab, part, threads}, target, held, block.get(), &part_highest[part * most],
                    &part_total[part * most], aimed.get()
                );
            for (int64_t r = 0; r < pitch; r++) {
                const Softmax found(part_highest.get(), part_total.get(), threads, most, r);
                highest[r] = found.highest;
                scale[r] = held && r < count ? weight[first + r] / found.total : 0.0f;
            }
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < count; r++) {
                const Softmax found(part_highest.get(), part_total.get(), threads, most, r);
                loss[first + r] = std::log(found.total) - (aimed[r] - found.highest);
            }
            if (!held) continue;
#pragma omp for schedule(static, 1)
            for (int64_t part = 0; part < threads; part++)
                gradient_part(
                    head, chunk, {vocab, part, threads}, target, weight, held, block.get(), spans.get(),
                    &part_grad_x[part * transposed], grad_w
                );
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < count; r++)
                for (int64_t d = 0; d < width; d++) {
                    float sum = 0;
                    for (int64_t part = 0; part < threads; part++)
                        sum += part_grad_x[part * transposed + d * pitch + r];
                    grad_x[(first + r) * width + d] = sum * head.inverse_temperature;
                }
        }
    }
}
