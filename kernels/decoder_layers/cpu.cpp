// A few new tokens through blocks of the transformer over a cache of latents, in float32: all steps of all layers in one
// call, whose threads meet at each step's end. Every step gives a token what it gives it alone (dots.h, token.h).
#include <vector>

#include "dots.h"
#include "mla_decode/token.h"
#include "moe_mlp/rows.h"
#include "norm_rope/row.h"
#include "router/choose.h"

namespace {

constexpr int64_t LEAST_WORK = 1 << 21;  // products of numbers in a call, below which other threads are not woken

// As `pack` in __init__.py writes them; what a layer has not is a null pointer.
struct Layer {
    const float *attention_norm, *first, *q_norm, *q_up, *latent_norm, *up, *out, *ffn_norm, *gate_up, *down, *gate, *bias,
        *shared_gate_up, *shared_down;
    int64_t hidden, shared_hidden;
};
static_assert(sizeof(Layer) == 16 * sizeof(int64_t), "a row of the table");

struct Sizes {
    int64_t width, heads, plain, turning, value, latent, q_rank, experts, chosen, groups, groups_allowed, sigmoid_affinity,
        normalised;
};

struct Numbers {
    double eps, latent_eps, scale, routed_scale;
};

// Rows that go through a layer: where they lie in x, in which slot and at which place.
struct Rows {
    float *x;
    std::vector<int64_t> slot, place;

    int64_t count() const { return slot.size(); }
};

// The slots of a layer's cache, `slot` numbers apart, or its pages, of `page` places, which a table (B, `pages`) names.
struct Cache {
    int64_t slot;
    const int64_t *table;
    int64_t pages, page;

    latent_attention::Places row(float *layer, int64_t b) const {
        return table ? latent_attention::Places{layer, table + b * pages, page, slot}
                     : latent_attention::Places{layer + b * slot};
    }
};

struct Head {
    const float *norm, *weight;
    float *logits;
    int64_t columns;
};

class Step {
public:
    Step(const Sizes &n, const Numbers &by, const float *cosine, const float *sine, const Cache &lying, int64_t most_rows,
         int64_t widest, int64_t threads)
        : n(n), by(by), attention{n.heads, n.plain, n.turning, n.value, n.latent},
          router{n.experts, n.chosen, n.groups, n.groups_allowed, n.sigmoid_affinity, n.normalised,
                 static_cast<float>(by.routed_scale)},
          cosine(cosine), sine(sine), lying(lying), threads(threads), query(n.heads * (n.plain + n.turning)),
          normed(most_rows * n.width), projected(most_rows * (first_columns())), turned(most_rows * query),
          mixed(most_rows * n.heads * n.value), inner(most_rows * 2 * widest), active(most_rows * widest),
          score(most_rows * n.experts), gates(most_rows * n.chosen), made(most_rows * (n.chosen + 1) * n.width),
          expert(most_rows * n.chosen), order(most_rows * n.chosen), token(most_rows * n.chosen),
          place(most_rows * n.chosen), bounds(n.experts + 1) {}

    int64_t first_columns() const { return first_query() + n.latent + n.turning; }
    int64_t first_query() const { return n.q_rank ? n.q_rank : n.heads * (n.plain + n.turning); }

    // By all threads of a parallel region, as what follows: these rows' latents and keys alone, as the layer keeps them.
    void keep(const Layer &layer, const Rows &rows, float *cache) {
        norm(rows.x, layer.attention_norm, rows.count(), n.width, n.width, by.eps, normed.data(), n.width);
        const int64_t kept = n.latent + n.turning;
        const float *weight = layer.first + first_query() * n.width;
        product(normed.data(), n.width, weight, kept, n.width, projected.data(), kept, rows.count());
        write(layer, rows, projected.data(), kept, cache);
    }

    void run(const Layer &layer, const Rows &rows, float *cache) {
        attend(layer, rows, cache);
        norm(rows.x, layer.ffn_norm, rows.count(), n.width, n.width, by.eps, normed.data(), n.width);
        if (layer.gate) mixture(layer, rows);
        else dense(layer, rows);
    }

    void logits(const Head &head, const float *x, int64_t rows) {
        norm(x, head.norm, rows, n.width, n.width, by.eps, normed.data(), n.width);
        product(normed.data(), n.width, head.weight, head.columns, n.width, head.logits, head.columns, rows);
    }

private:
    const Sizes &n;
    const Numbers &by;
    const latent_attention::Sizes attention;
    const router::Sizes router;
    const float *cosine, *sine;
    const Cache &lying;
    const int64_t threads, query;
    std::vector<float> normed, projected, turned, mixed, inner, active, score, gates, made;
    std::vector<int64_t> expert, order, token, place, bounds;

    static void norm(const float *x, const float *weight, int64_t rows, int64_t width, int64_t x_row, double eps, float *y,
                     int64_t y_row) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) norm_row(x + r * x_row, weight, y + r * y_row, width, eps);
    }

    // y (rows, columns), or what is added to `sum`, = x (rows, depth) · wᵀ.
    void product(const float *x, int64_t x_row, const float *w, int64_t columns, int64_t depth, float *y, int64_t y_row,
                 int64_t rows, float *sum = nullptr) const {
        const int64_t parts = (columns + DOTS_COLUMNS - 1) / DOTS_COLUMNS;
        const int64_t strip = (parts + threads - 1) / threads * DOTS_COLUMNS;
        std::vector<const float *> from(rows);
        std::vector<float *> to(rows);
        for (int64_t r = 0; r < rows; r++) from[r] = x + r * x_row;
#pragma omp for schedule(static)
        for (int64_t c = 0; c < columns; c += strip) {
            const int64_t here = std::min(strip, columns - c);
            for (int64_t r = 0; r < rows; r++) to[r] = y + r * y_row + c;
            dots(from.data(), rows, w + c * depth, depth, here, depth, to.data());
            for (int64_t r = 0; sum && r < rows; r++)
                for (int64_t i = 0; i < here; i++) sum[r * y_row + c + i] += to[r][i];
        }
    }

    void write(const Layer &layer, const Rows &rows, const float *kv, int64_t kv_row, float *cache) const {
        const int64_t half = n.turning / 2;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows.count(); r++) {
            const int64_t p = rows.place[r];
            float *to = lying.row(cache, rows.slot[r]).at(p, attention.cached());
            latent_attention::keep(
                kv + r * kv_row, layer.latent_norm, by.latent_eps, cosine + p * half, sine + p * half, to, attention
            );
        }
    }

    void attend(const Layer &layer, const Rows &rows, float *cache) {
        const int64_t count = rows.count(), columns = first_columns(), half = n.turning / 2, out = n.heads * n.value;
        norm(rows.x, layer.attention_norm, count, n.width, n.width, by.eps, normed.data(), n.width);
        product(normed.data(), n.width, layer.first, columns, n.width, projected.data(), columns, count);
        const float *q = projected.data();
        int64_t q_row = columns;
        if (n.q_rank) {  // its normed latent takes the place of x in the room for it
            norm(q, layer.q_norm, count, n.q_rank, columns, by.latent_eps, active.data(), n.q_rank);
            product(active.data(), n.q_rank, layer.q_up, query, n.q_rank, turned.data(), query, count);
            q = turned.data();
            q_row = query;
        }
        write(layer, rows, projected.data() + first_query(), columns, cache);
        latent_attention::Room room(attention);
#pragma omp for schedule(dynamic, 2)
        for (int64_t r = 0; r < count; r++) {
            const int64_t p = rows.place[r];
            latent_attention::attend(
                q + r * q_row, lying.row(cache, rows.slot[r]), p + 1, cosine + p * half, sine + p * half, layer.up,
                by.scale, mixed.data() + r * out, attention, room
            );
        }
        product(mixed.data(), out, layer.out, n.width, out, normed.data(), n.width, count, rows.x);
    }

    void dense(const Layer &layer, const Rows &rows) {
        const int64_t hidden = layer.hidden;
        product(normed.data(), n.width, layer.gate_up, 2 * hidden, n.width, inner.data(), 2 * hidden, rows.count());
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows.count(); r++)
            moe::activate(inner.data() + r * 2 * hidden, 1.0f, active.data() + r * hidden, hidden);
        product(active.data(), hidden, layer.down, n.width, hidden, made.data(), n.width, rows.count(), rows.x);
    }

    void choose(const Layer &layer, int64_t rows) {
        product(normed.data(), n.width, layer.gate, n.experts, n.width, score.data(), n.experts, rows);
        router::Room room(router);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            router::choose_row(
                score.data() + r * n.experts, layer.bias, expert.data() + r * n.chosen, gates.data() + r * n.chosen, router,
                room
            );
#pragma omp single
        {
            moe::sort_choices(expert.data(), order.data(), bounds.data(), rows * n.chosen, n.experts);
            moe::places(order.data(), token.data(), place.data(), rows * n.chosen, n.chosen);
        }
    }

    // Tasks are an expert each, and last the shared ones, which every row takes.
    void mixture(const Layer &layer, const Rows &rows) {
        const int64_t count = rows.count();
        choose(layer, count);
        float *shared = made.data() + count * n.chosen * n.width;
        moe::Room room;
        std::vector<float> weight(count);
        std::vector<const float *> from(count);
        std::vector<float *> to(count);
#pragma omp for schedule(dynamic)
        for (int64_t e = 0; e < n.experts + (layer.shared_hidden > 0); e++) {
            const bool all = e == n.experts;
            const int64_t begin = all ? 0 : bounds[e], here = all ? count : bounds[e + 1] - begin;
            if (here == 0) continue;
            for (int64_t r = 0; r < here; r++) {
                from[r] = normed.data() + (all ? r : token[begin + r]) * n.width;
                to[r] = (all ? shared : made.data()) + (begin + r) * n.width;
                weight[r] = all ? 1.0f : gates[order[begin + r]];
            }
            const int64_t hidden = all ? layer.shared_hidden : layer.hidden, size = n.width * hidden;
            moe::few_rows(
                from.data(), weight.data(), all ? layer.shared_gate_up : layer.gate_up + e * 2 * size,
                all ? layer.shared_down : layer.down + e * size, to.data(), here, n.width, hidden, room
            );
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < count; r++) {
            float *sum = normed.data() + r * n.width, *x = rows.x + r * n.width;
            moe::sum_choices(made.data(), place.data(), normed.data(), r, n.chosen, n.width);
            for (int64_t i = 0; i < n.width; i++) x[i] += layer.shared_hidden ? sum[i] + shared[r * n.width + i] : sum[i];
        }
    }
};

// Weights that a token reads.
int64_t weights_of(const Layer &layer, const Sizes &n) {
    const int64_t query = n.heads * (n.plain + n.turning);
    const int64_t first = n.q_rank ? n.q_rank * (n.width + query) : n.width * query;
    const int64_t attention = first + n.width * (n.latent + n.turning + n.heads * n.value)
                              + n.heads * (n.plain + n.value) * n.latent;
    const int64_t taken = layer.gate ? n.chosen * layer.hidden + layer.shared_hidden : layer.hidden;
    return attention + 3 * n.width * taken;
}

}  // namespace

extern "C" {

// x (B, S, D), token s of row b at place start[b] + s of slot b, goes through `count` layers of the table: its rows become
// what the last one gives. Where `asked` (B) is given, each row's token of that number alone goes through the only layer,
// into `picked` (B, D), and of the others the cache keeps what it keeps of tokens. Then logits (rows, V), where there is a
// head. With a table (B, `pages`) a row's places are those of the slots that it names, of `slots`, of `page` places each.
// Gives 1, and does nothing, where a place is not within the slot, a token that is asked for not within the row, or a page
// none of the cache.
int layers(
    float *x, const Layer *layer, int64_t count, const Sizes *sizes, double eps, double latent_eps, double scale,
    double routed_scale, const int64_t *start, int64_t batch, int64_t length, const float *cosine, const float *sine,
    float *cache, int64_t layer_stride, int64_t slot, const int64_t *table, int64_t pages, int64_t page, int64_t slots,
    int64_t places, const int64_t *asked, float *picked,
    const float *head_norm, const float *head, float *logits, int64_t vocabulary, int64_t threads
) {
    const Sizes &n = *sizes;
    const Numbers by{eps, latent_eps, scale, routed_scale};
    Rows rows{x, {}, {}}, own{picked, {}, {}};
    for (int64_t b = 0; b < batch; b++) {
        if (start[b] < 0 || start[b] + length > places) return 1;
        for (int64_t j = 0; table && j * page < start[b] + length; j++)
            if (table[b * pages + j] < 0 || table[b * pages + j] >= slots) return 1;
        if (asked && (asked[b] < 0 || asked[b] >= length)) return 1;
        for (int64_t s = 0; s < length; s++) {
            rows.slot.push_back(b);
            rows.place.push_back(start[b] + s);
        }
        if (!asked) continue;
        own.slot.push_back(b);
        own.place.push_back(start[b] + asked[b]);
        std::memcpy(picked + b * n.width, x + (b * length + asked[b]) * n.width, n.width * sizeof(float));
    }
    const Rows &through = asked ? own : rows;
    int64_t widest = n.q_rank, work = head ? n.width * vocabulary : 0;
    for (int64_t l = 0; l < count; l++) {
        if (!layer[l].gate) widest = std::max(widest, layer[l].hidden);
        work += weights_of(layer[l], n);
    }
    if (work * through.count() < LEAST_WORK) threads = 1;
    const Cache lying{slot, table, pages, page};
    Step step(n, by, cosine, sine, lying, rows.count(), widest, threads);
    const Head last{head_norm, head, logits, vocabulary};
#pragma omp parallel num_threads(threads)
    {
        if (asked && length > 1) step.keep(layer[0], rows, cache);
        for (int64_t l = 0; l < count; l++) step.run(layer[l], through, cache + l * layer_stride);
        if (head) step.logits(last, through.x, through.count());
    }
    return 0;
}

// joined (rows, D) = w · (norm of embedding, norm of the final norm of hidden), w (D, 2 D): what an MTP module begins with.
void join(
    const float *hidden, const float *embedding, const float *final_norm, const float *hidden_norm,
    const float *embedding_norm, const float *w, float *joined, int64_t rows, int64_t width, double eps, int64_t threads
) {
    std::vector<float> both(rows * 2 * width), behind(rows * width);
    std::vector<const float *> from(rows);
    if (rows * width * width * 2 < LEAST_WORK) threads = 1;
    const int64_t parts = (width + DOTS_COLUMNS - 1) / DOTS_COLUMNS, strip = (parts + threads - 1) / threads * DOTS_COLUMNS;
    for (int64_t r = 0; r < rows; r++) from[r] = both.data() + r * 2 * width;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float *> to(rows);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            float *at = both.data() + r * 2 * width;
            norm_row(embedding + r * width, embedding_norm, at, width, eps);
            norm_row(hidden + r * width, final_norm, behind.data() + r * width, width, eps);
            norm_row(behind.data() + r * width, hidden_norm, at + width, width, eps);
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < width; c += strip) {
            for (int64_t r = 0; r < rows; r++) to[r] = joined + r * width + c;
            dots(from.data(), rows, w + c * 2 * width, 2 * width, std::min(strip, width - c), 2 * width, to.data());
        }
    }
}
}
