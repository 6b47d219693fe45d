// The output head and its cross-entropy: products, softmax and slope of a block of the head's rows at a time, in a cache.
//
// Logits lie as (vocabulary, rows), rows being those of a chunk: then a vector holds one logit of many rows, the softmax
// takes no sums across lanes, and each of the three products finds its operands in the order in which it reads them:
//
//     logits (v, r)  = Σ_d  w(v, d) · x(r, d)         w as it lies,       x in panels of its transpose
//     grad_x (d, r) += Σ_v  w(v, d) · slope(v, r)     w in panels,        the slope as it lies
//     grad_w (v, d) += Σ_r  slope(v, r) · x(r, d)     slope as it lies,   x in panels
//
// `Kind` is Exact or Rounded. Rounded, w and the slope do not lie as they are read: numbers may be pairs of neighbours in
// the sum, so each product has its own packed form of them, a block at a time.
#include "cross_entropy/tiles.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

namespace {

constexpr int64_t BLOCK = 16 * TALL;           // rows of the head at a time
constexpr int64_t DEPTH = 256;                 // terms of a logit at a time: a panel of x stays in the first cache, or near it
constexpr int64_t SPAN = 64 * TALL;            // columns of the head at a time in the gradients
constexpr float LOWEST = 1e30f;                // what minus infinity is taken for, times a probability of zero

int64_t up_to(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

struct Freed {
    void operator()(void *at) const { ::operator delete[](at, std::align_val_t(64)); }
};
template <typename Number>
using Many = std::unique_ptr<Number[], Freed>;
using Floats = Many<float>;

template <typename Number>
Many<Number> many(int64_t count) {
    return Many<Number>(static_cast<Number *>(::operator new[](count * sizeof(Number), std::align_val_t(64))));
}

Floats floats(int64_t count) { return many<float>(count); }

// Neighbours in the sum, the second of which may be beyond the end.
template <typename Kind>
typename Kind::Number pair(const float *first, int64_t apart, bool whole) {
    return Kind::made(*first, Kind::STEP == 2 && whole ? first[apart] : 0.0f);
}

struct Head {
    const float *x, *w;
    int64_t width, vocab;
    float inverse_temperature;
};

// Rows of x that are taken at once, and what is made of them.
template <typename Kind>
struct Chunk {
    int64_t first, rows, pitch;    // pitch: the rows filled up to whole tiles, with zeros
    int64_t slope_pitch;           // an odd number of lines of a cache, so that a column of them does not evict itself
    // x / temperature: panels of WIDE rows, column by column; and of WIDE columns, row by row
    const typename Kind::Number *across, *along;
    const float *highest, *scale;  // of each row: the largest logit, and weight / sum of the exponentials
};

template <typename Kind>
void pack_across(const Head &head, int64_t first, int64_t rows, int64_t panel, typename Kind::Number *to) {
    const int64_t count = numbers_of<Kind>(head.width);
    to += panel * WIDE * count;
    for (int64_t j = 0; j < WIDE; j++) {
        const int64_t row = panel * WIDE + j;
        const float *x = head.x + (first + row) * head.width;
        for (int64_t n = 0, d = 0; n < count; n++, d += Kind::STEP) {
            if (row >= rows)
                to[n * WIDE + j] = 0;
            else if (Kind::STEP == 2 && d + 1 < head.width)
                to[n * WIDE + j] = Kind::made(x[d] * head.inverse_temperature, x[d + 1] * head.inverse_temperature);
            else
                to[n * WIDE + j] = Kind::made(x[d] * head.inverse_temperature, 0.0f);
        }
    }
}

template <typename Kind>
void pack_along(const Head &head, int64_t first, int64_t rows, int64_t panel, typename Kind::Number *to) {
    const int64_t begin = panel * WIDE, columns = std::min(WIDE, head.width - begin), count = numbers_of<Kind>(rows);
    to += panel * WIDE * count;
    for (int64_t n = 0; n < count; n++, to += WIDE) {
        const float *x = head.x + (first + n * Kind::STEP) * head.width + begin;
        const bool two = Kind::STEP == 2 && n * 2 + 1 < rows;
        for (int64_t j = 0; j < WIDE; j += LANES) {
            const int64_t left = std::max<int64_t>(0, columns - j);
            const Vector one = load(x + j, left), other = two ? load(x + head.width + j, left) : Vector{};
            const auto made = Kind::made(one * head.inverse_temperature, other * head.inverse_temperature);
            std::memcpy(to + j, &made, sizeof made);
        }
    }
}

// `count` rows of the head and so many columns of them, as the logits' product reads them: rows filled up to TALL.
template <typename Kind>
struct Rows {
    const typename Kind::Number *at;
    int64_t row;

    Rows(const float *w, int64_t width, int64_t count, int64_t depth, typename Kind::Number *room)
        : at(room), row(numbers_of<Kind>(depth)) {
        if constexpr (std::is_same_v<Kind, Exact>)
            if (count % TALL == 0) {
                at = w;
                row = width;
                return;
            }
        for (int64_t i = 0; i < up_to(count, TALL); i++)
            pack_row<Kind>(w + std::min(i, count - 1) * width, depth, room + i * row);
    }
};

// Logits of `count` rows of the head from v on, (count filled up to TALL, pitch). A tile that would begin too late to
// be full has the last row of the head again, whose logits nobody looks at.
template <typename Kind>
__attribute__((noinline)) void logits(
    const Head &head, const Chunk<Kind> &chunk, int64_t v, int64_t count, typename Kind::Number *room, float *to
) {
    int64_t d = 0;
    do {  // once without any columns, too: then they are zero
        const int64_t depth = std::min(DEPTH, head.width - d);
        const Rows<Kind> rows(head.w + v * head.width + d, head.width, count, depth, room);
        const int64_t panel = numbers_of<Kind>(head.width) * WIDE;
        const typename Kind::Number *x = chunk.across + d / Kind::STEP * WIDE;
        // Apart, as the places of six rows need registers too
        const auto tile = [&](int64_t i, int64_t r, auto down, auto across) __attribute__((noinline)) {
            float *place = to + i * chunk.pitch + r;
            const Operands<typename Kind::Number> of{
                rows.at + i * rows.row, TALL * rows.row, rows.row, 1, x + r / WIDE * panel, panel, WIDE
            };
            if (d == 0)
                put(product<Kind, down(), across()>(of, numbers_of<Kind>(depth)), place, chunk.pitch);
            else
                add(product<Kind, down(), across()>(of, numbers_of<Kind>(depth)), place, chunk.pitch);
        };
        in_tiles(up_to(count, TALL), chunk.pitch, tile);
    } while ((d += DEPTH) < head.width);
}

// Of each row the largest logit m, Σ exp(z − m) and Σ exp(z − m) · (z − m), a block's added to those before it.
// The last is left out where `weighted` is null.
void statistics(const float *z, int64_t count, int64_t pitch, float *highest, float *total, float *weighted) {
    for (int64_t r = 0; r < pitch; r += LANES) {
        const Vector before = load(highest + r);
        Vector most = before;
        for (int64_t v = 0; v < count; v++) most = larger(load(z + v * pitch + r), most);
        const Vector shift = most == -INFINITY ? all(0.0f) : most;  // minus infinity from itself is not a number
        Vector added{}, added_weighted{};
        const Vector moved = before - shift, kept = exponential(moved), sum = load(total + r);
        if (weighted) {
            for (int64_t v = 0; v < count; v++) {
                const Vector below = load(z + v * pitch + r) - shift, share = exponential(below);
                added += share;
                added_weighted += share * larger(below, all(-LOWEST));
            }
            store(weighted + r, (load(weighted + r) + sum * larger(moved, all(-LOWEST))) * kept + added_weighted);
        } else
            for (int64_t v = 0; v < count; v++) added += exponential(load(z + v * pitch + r) - shift);
        store(highest + r, most);
        store(total + r, sum * kept + added);
    }
}

// weight · (softmax − onehot)
template <typename Kind>
__attribute__((noinline)) void slopes(
    const Chunk<Kind> &chunk, const int64_t *target, const float *weight, const float *z, int64_t v, int64_t count,
    float *to
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

// A block of slopes as the two products read them: over the head's rows (v), and over those of x (r).
template <typename Kind>
struct Slope {
    const typename Kind::Number *over_v, *over_r;
    int64_t v_row, r_row;

    Slope(const Chunk<Kind> &chunk, const float *slope, int64_t count, typename Kind::Number *room) {
        if constexpr (std::is_same_v<Kind, Exact>) {
            over_v = over_r = slope;
            v_row = r_row = chunk.slope_pitch;
            return;
        }
        typename Kind::Number *down = room, *along = room + numbers_of<Kind>(BLOCK) * chunk.pitch;
        over_v = down;
        over_r = along;
        v_row = chunk.pitch;
        r_row = chunk.pitch / Kind::STEP | LANES;  // no power of two
        for (int64_t n = 0; n < numbers_of<Kind>(count); n++) {
            const float *first = slope + n * Kind::STEP * chunk.slope_pitch;
            const bool two = (n + 1) * Kind::STEP <= count;
            for (int64_t r = 0; r < chunk.pitch; r += LANES) {
                const Vector other = two ? load(first + (Kind::STEP - 1) * chunk.slope_pitch + r) : Vector{};
                const auto made = Kind::made(load(first + r), other);
                std::memcpy(down + n * v_row + r, &made, sizeof made);
            }
        }
        for (int64_t i = 0; i < up_to(count, TALL); i++)
            for (int64_t n = 0; n < chunk.pitch / Kind::STEP; n += LANES) {
                const auto made = Kind::row(slope + std::min(i, count - 1) * chunk.slope_pitch + n * Kind::STEP);
                std::memcpy(along + i * r_row + n, &made, sizeof made);
            }
    }

    static int64_t room(int64_t most) {
        return numbers_of<Kind>(BLOCK) * most + BLOCK * (most / Kind::STEP + LANES);
    }
};

// What a block of the head's rows adds to the gradient of x, transposed and of a part of the columns, (span, pitch).
template <typename Kind>
__attribute__((noinline)) void add_to_grad_x(
    const Head &head, const Chunk<Kind> &chunk, const Slope<Kind> &slope, int64_t v, int64_t count, int64_t d,
    int64_t span, typename Kind::Number *panels, float *grad_x
) {
    const int64_t numbers = numbers_of<Kind>(count);
    for (int64_t n = 0; n < numbers; n++) {
        const float *w = head.w + (v + n * Kind::STEP) * head.width + d;
        const bool two = (n + 1) * Kind::STEP <= count;
        typename Kind::Number *panel = panels + n * TALL, line[SPAN];
        int64_t j = 0;
        for (; j + LANES <= span; j += LANES) {
            const auto made = Kind::made(load(w + j), two ? load(w + (Kind::STEP - 1) * head.width + j) : Vector{});
            std::memcpy(line + j, &made, sizeof made);
        }
        for (; j < span; j++) line[j] = pair<Kind>(w + j, head.width, two);
        std::fill(line + span, line + up_to(span, TALL), 0);
        for (j = 0; j < span; j += TALL, panel += TALL * numbers) std::memcpy(panel, line + j, TALL * sizeof line[0]);
    }
    in_tiles(up_to(span, TALL), chunk.pitch, [&](int64_t j, int64_t r, auto down, auto across) {
        const auto tile = product<Kind, down(), across()>(
            {panels + j * numbers, TALL * numbers, 1, TALL, slope.over_v + r, WIDE, slope.v_row}, numbers
        );
        add(tile, grad_x + (d + j) * chunk.pitch + r, chunk.pitch);
    });
}

// What a chunk adds to the gradient of a block of the head's rows, of a part of the columns.
template <typename Kind>
__attribute__((noinline)) void add_to_grad_w(
    const Head &head, const Chunk<Kind> &chunk, const Slope<Kind> &slope, int64_t v, int64_t count, int64_t d,
    int64_t span, float *grad_w
) {
    const int64_t numbers = numbers_of<Kind>(chunk.rows), panel = numbers * WIDE;
    in_tiles(up_to(count, TALL), up_to(span, WIDE), [&](int64_t i, int64_t j, auto down, auto across) {
        float *place = grad_w + (v + i) * head.width + d + j;
        const int64_t rows = std::min(down() * TALL, count - i), columns = std::min(across() * WIDE, span - j);
        for (int64_t k = 0; k < rows; k++)
            for (int64_t at = 0; at < columns; at += WIDE) __builtin_prefetch(place + k * head.width + at, 1);
        const auto *slopes = slope.over_r + i * slope.r_row, *x = chunk.along + (d + j) / WIDE * panel;
        const Operands<typename Kind::Number> of{slopes, TALL * slope.r_row, slope.r_row, 1, x, panel, WIDE};
        if (rows == down() * TALL && columns == across() * WIDE)
            add(product<Kind, down(), across()>(of, numbers), place, head.width);
        else  // apart, so that the sums of whole tiles stay in registers
            add_part(product<Kind, down(), across()>(of, numbers), place, head.width, rows, columns);
    });
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

// The softmax of a part of the vocabulary: each row's statistics and, where its target is in this part, the target's
// logit. Logits stay in `held`, or are gone with their block where that is null.
template <typename Kind>
void softmax_part(
    const Head &head, const Chunk<Kind> &chunk, const Part &part, const int64_t *target, float *held, float *block,
    typename Kind::Number *room, float *highest, float *total, float *weighted, float *aimed
) {
    std::fill_n(highest, chunk.pitch, -INFINITY);
    std::fill_n(total, chunk.pitch, 0.0f);
    if (weighted) std::fill_n(weighted, chunk.pitch, 0.0f);
    for (int64_t v = part.begin; v < part.end; v += BLOCK) {
        const int64_t count = std::min(BLOCK, part.end - v);
        float *z = held ? held + v * chunk.pitch : block;
        logits<Kind>(head, chunk, v, count, room, z);
        statistics(z, count, chunk.pitch, highest, total, weighted);
        for (int64_t r = 0; r < chunk.rows; r++) {
            const int64_t row = target[chunk.first + r] - v;
            if (row >= 0 && row < count) aimed[r] = z[row * chunk.pitch + r];
        }
    }
}

// What a part of the vocabulary gives to grad_x, transposed, (width filled up to TALL, pitch), and its rows of grad_w.
template <typename Kind>
void gradient_part(
    const Head &head, const Chunk<Kind> &chunk, const Part &part, const int64_t *target, const float *weight,
    const float *held, float *block, typename Kind::Number *room, typename Kind::Number *panels, float *grad_x,
    float *grad_w
) {
    std::fill_n(grad_x, up_to(head.width, TALL) * chunk.pitch, 0.0f);
    for (int64_t v = part.begin; v < part.end; v += BLOCK) {
        const int64_t count = std::min(BLOCK, part.end - v);
        slopes<Kind>(chunk, target, weight, held + v * chunk.pitch, v, count, block);
        const Slope<Kind> slope(chunk, block, count, room);
        for (int64_t d = 0; d < head.width; d += SPAN) {
            const int64_t span = std::min(SPAN, head.width - d);
            add_to_grad_x<Kind>(head, chunk, slope, v, count, d, span, panels, grad_x);
            add_to_grad_w<Kind>(head, chunk, slope, v, count, d, span, grad_w);
        }
    }
}

// Statistics of each row by each thread, `most` rows one after the other.
struct Parts {
    int64_t threads, most;
    Floats highest = floats(threads * most), total = floats(threads * most), weighted = floats(threads * most);
};

// What the parts found of row r, as one.
struct Softmax {
    float highest = -INFINITY, total = 0;
    Softmax(const Parts &parts, int64_t r) {
        for (int64_t i = r; i < parts.threads * parts.most; i += parts.most)
            highest = std::max(highest, parts.highest[i]);
        for (int64_t i = r; i < parts.threads * parts.most; i += parts.most)
            total += parts.total[i] * std::exp(parts.highest[i] - highest);
    }
    float log_total() const { return highest + std::log(total); }
    // −Σ p · log p = log Σ exp(z − m) − Σ p · (z − m)
    float entropy(const Parts &parts, int64_t r) const {
        float weighted = 0;
        for (int64_t i = r; i < parts.threads * parts.most; i += parts.most) {
            const float moved = parts.highest[i] - highest;
            weighted += (parts.weighted[i] + parts.total[i] * std::max(moved, -LOWEST)) * std::exp(moved);
        }
        return std::log(total) - weighted / total;
    }
};

// What `cross_entropy` says below, with products of this kind.
template <typename Kind>
void losses(
    const Head &head, const int64_t *target, const float *weight, float z_loss, int64_t rows, int64_t most,
    float *held, float *loss, float *entropy, float *grad_x, float *grad_w, int64_t threads
) {
    typedef typename Kind::Number Number;
    const int64_t width = head.width, vocab = head.vocab, transposed = held ? up_to(width, TALL) * most : 0;
    const int64_t panels = up_to(width, WIDE) / WIDE;
    const Many<Number> across = many<Number>(most * numbers_of<Kind>(width));
    const Many<Number> along = many<Number>(numbers_of<Kind>(most) * panels * WIDE);
    const Parts parts{threads, most};
    const Floats aimed = floats(most), part_grad_x = floats(threads * transposed);
#pragma omp parallel num_threads(threads)
    {
        const Floats block = floats(BLOCK * (most + WIDE));
        const Many<Number> spans = many<Number>(numbers_of<Kind>(BLOCK) * SPAN);
        const Many<Number> room = many<Number>(std::max(Slope<Kind>::room(most), BLOCK * DEPTH / Kind::STEP));
        const Floats highest = floats(most), scale = floats(most);  // in each thread, which saves waiting
        for (int64_t first = 0; first < rows; first += most) {
            const int64_t count = std::min(most, rows - first), pitch = up_to(count, WIDE);
            const Chunk<Kind> chunk{
                first, count, pitch, pitch | WIDE, across.get(), along.get(), highest.get(), scale.get()
            };
#pragma omp for schedule(static) nowait
            for (int64_t panel = 0; panel < pitch / WIDE; panel++)
                pack_across<Kind>(head, first, count, panel, across.get());
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels; panel++) pack_along<Kind>(head, first, count, panel, along.get());
#pragma omp for schedule(static, 1)
            for (int64_t part = 0; part < threads; part++)
                softmax_part<Kind>(
                    head, chunk, {vocab, part, threads}, target, held, block.get(), room.get(),
                    &parts.highest[part * most], &parts.total[part * most],
                    entropy ? &parts.weighted[part * most] : nullptr, aimed.get()
                );
            for (int64_t r = 0; r < pitch; r++) {
                const Softmax found(parts, r);
                highest[r] = found.highest;
                scale[r] = held && r < count ? weight[first + r] / found.total : 0.0f;
                if (z_loss != 0.0f) scale[r] *= 1.0f + 2.0f * z_loss * found.log_total();
            }
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < count; r++) {
                const Softmax found(parts, r);
                loss[first + r] = std::log(found.total) - (aimed[r] - found.highest);
                if (z_loss != 0.0f) loss[first + r] += z_loss * found.log_total() * found.log_total();
                if (entropy) entropy[first + r] = found.entropy(parts, r);
            }
            if (!held) continue;
#pragma omp for schedule(static, 1)
            for (int64_t part = 0; part < threads; part++)
                gradient_part<Kind>(
                    head, chunk, {vocab, part, threads}, target, weight, held, block.get(), room.get(), spans.get(),
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

}  // namespace

// The loss of each row, −log softmax(x·wᵀ / temperature) at its target, to which z_loss · (log Σ exp)² is added, and the
// softmax's entropy unless that is null; and the gradients of Σ weight · loss, that of w added to what is there, unless
// `held` is null. `most` rows, a whole number of tiles, are taken at once, and their
// logits stay in `held`, (vocab filled up to TALL, most). Each thread takes a part of the vocabulary. Products take
// numbers as they are, or rounded to bfloat16.
extern "C" void cross_entropy(
    const float *x, const float *w, const int64_t *target, const float *weight, int64_t rows, int64_t width,
    int64_t vocab, double inverse_temperature, double z_loss, int64_t most, int64_t rounded, float *held, float *loss,
    float *entropy, float *grad_x, float *grad_w, int64_t threads
) {
    const Head head{x, w, width, vocab, static_cast<float>(inverse_temperature)};
    (rounded ? losses<Rounded> : losses<Exact>)(
        head, target, weight, static_cast<float>(z_loss), rows, most, held, loss, entropy, grad_x, grad_w, threads
    );
}
