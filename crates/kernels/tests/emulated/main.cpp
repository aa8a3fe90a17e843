// Runs choose.cuh and the kernels of attention.cu, attention_backward.cu and tokens.cu on a device on the host and holds
// what they give, in bf16, against the plainest way in double precision. Exit code 0 if all is near.
#include "device.h"
#include "kernels.inc"

#include <algorithm>
#include <random>

typedef std::vector<double> Doubles;
static std::mt19937 generator(1);
static bool failed = false;

static std::vector<elem> draw(size_t n) {
    std::normal_distribution<float> normal;
    std::vector<elem> numbers(n);
    for (elem& v : numbers) v = of_float(normal(generator));
    return numbers;
}
static std::vector<elem> unwritten(size_t n) { return std::vector<elem>(n, 0x7fff); }

// A missing number is infinitely far.
static void hold(const char* what, const Doubles& given, const Doubles& expected) {
    double difference = 0.0, size = 0.0;
    for (size_t i = 0; i < expected.size(); i++) difference += pow(given[i] - expected[i], 2), size += pow(expected[i], 2);
    const double distance = sqrt(difference / (size > 0.0 ? size : 1.0));
    const bool near = distance < 5e-3;
    printf("  %s: %.1e%s\n", what, distance, near ? "" : " FAR");
    failed |= !near;
}
static void hold(const char* what, const std::vector<elem>& given, const Doubles& expected) {
    Doubles wide;
    for (elem v : given) wide.push_back(to_float(v));
    hold(what, wide, expected);
}
static void hold(const char* what, const std::vector<float>& given, const Doubles& expected) { hold(what, Doubles(given.begin(), given.end()), expected); }

struct Case {
    u32 batch, queries, keys, heads, kv_heads, window;
    std::vector<u32> starts, lengths;
    bool trains;
};

template <u32 D>
static void attention(const Case& c) {
    const double scale = 1.0 / sqrt(double(D));
    const u32 room = c.trains ? c.keys : c.keys + 5;
    const size_t rows = size_t(c.batch) * c.queries * c.heads, kv = size_t(c.batch) * room * c.kv_heads;
    const auto q = draw(rows * D), k = draw(kv * D), v = draw(kv * D), dout = draw(rows * D);
    Doubles out(rows * D), dq(rows * D), dk(kv * D), dv(kv * D);
    for (size_t of = 0; of < rows; of++) {
        const u32 head = of % c.heads, query = of / c.heads % c.queries, row = of / c.heads / c.queries, position = c.keys - c.queries + query;
        if (!c.lengths.empty() && query >= c.lengths[row]) continue;
        auto at = [&](u32 key) { return ((size_t(row) * room + key) * c.kv_heads + head / (c.heads / c.kv_heads)) * D; };
        auto dot = [&](const std::vector<elem>& a, size_t i, const std::vector<elem>& b, size_t j) {
            double sum = 0.0;
            for (u32 d = 0; d < D; d++) sum += double(to_float(a[i + d])) * to_float(b[j + d]);
            return sum;
        };
        std::vector<std::pair<u32, double>> shares;
        double all = 0.0;
        for (u32 key = c.starts.empty() ? 0 : c.starts[row]; key <= position; key++)
            if (!c.window || position - key < c.window) shares.push_back({key, exp(dot(q, of * D, k, at(key)) * scale)}), all += shares.back().second;
        double delta = 0.0;
        for (auto& [key, share] : shares) {
            share /= all;
            delta += share * dot(dout, of * D, v, at(key));
            for (u32 d = 0; d < D; d++) out[of * D + d] += share * to_float(v[at(key) + d]);
        }
        for (const auto& [key, share] : shares) {
            const double ds = share * (dot(dout, of * D, v, at(key)) - delta) * scale;
            for (u32 d = 0; d < D; d++) {
                dv[at(key) + d] += share * to_float(dout[of * D + d]);
                dk[at(key) + d] += ds * to_float(q[of * D + d]), dq[of * D + d] += ds * to_float(k[at(key) + d]);
            }
        }
    }
    printf("attention of heads of %u, %u of %u keys\n", D, c.queries, c.keys);
    auto given = unwritten(rows * D);
    std::vector<float> sums(rows, NAN), deltas(rows, NAN);
    auto numbers = [](const std::vector<u32>& v) { return v.empty() ? nullptr : v.data(); };
    const Seen seen = {numbers(c.starts), numbers(c.lengths), c.batch, c.queries, c.keys, c.heads, c.kv_heads, c.window ? c.window : ~0u, float(scale * M_LOG2E)};
    const Attend forward = {q.data(), k.data(), v.data(), given.data(), sums.data(), seen, u64(room) * c.kv_heads * D, u64(room) * c.kv_heads * D};
    const u32 tiles = (c.queries + 63) / 64;
    if (c.queries == 1) {
        launch(c.heads * c.batch, 256, [&] { attend_one<D>(forward); });
        hold("one query", given, out);
        std::fill(given.begin(), given.end(), 0x7fff);
    }
    launch(tiles * c.heads * c.batch, 128, [&] { attend<D>(forward); });
    hold("tiles", given, out);
    if (!c.trains) return;
    auto gq = unwritten(rows * D), gk = unwritten(kv * D), gv = unwritten(kv * D);
    const AttendBackward backward = {q.data(), k.data(), v.data(), given.data(), dout.data(), sums.data(), deltas.data(), gq.data(), gk.data(), gv.data(), seen, float(scale), D};
    launch((rows + 3) / 4, 128, [&] { attend_delta(backward); });
    const u32 of_keys = (c.keys + 63) / 64 * c.kv_heads * c.batch;
    if constexpr (D == 192) launch(2 * of_keys, 128, [&] { attend_keys_192(backward); });
    else launch(of_keys, 128, [&] { attend_keys<D, BOTH>(backward, blockIdx.x); });
    launch(tiles * c.heads * c.batch, 128, [&] { attend_queries<D>(backward); });
    hold("dq", gq, dq), hold("dk", gk, dk), hold("dv", gv, dv);
}

static void sums() {
    const u32 rows = 37, outputs = 9, width = 72;
    const auto x = draw(rows * width), dout = draw(outputs * width);
    std::vector<float> weights(rows), given_weights(rows, NAN);
    std::vector<u32> targets(rows), starts, index;
    for (u32 s = 0; s < rows; s++) weights[s] = 0.1f * s - 1.0f, targets[s] = s * 7 % (outputs - 1);
    for (u32 t = 0; t <= outputs; t++) {
        starts.push_back(index.size());
        for (u32 s = 0; s < rows && t < outputs; s++)
            if (targets[s] == t) index.push_back(s);
    }
    Doubles out(outputs * width), d_rows(rows * width), d_weights(rows);
    for (u32 i = 0; i < rows * width; i++) {
        const u32 s = i / width, to = targets[s] * width + i % width;
        out[to] += double(weights[s]) * to_float(x[i]), d_rows[i] = double(weights[s]) * to_float(dout[to]);
        d_weights[s] += double(to_float(x[i])) * to_float(dout[to]);
    }
    auto given = unwritten(outputs * width), given_rows = unwritten(rows * width);
    const SumRows forward = {x.data(), weights.data(), given.data(), starts.data(), index.data(), outputs, width};
    const SpreadRows backward = {dout.data(), x.data(), weights.data(), targets.data(), given_rows.data(), given_weights.data(), rows, width};
    printf("sums\n");
    launch(outputs, 256, [&] { sum_rows(forward); });
    launch((rows + 7) / 8, 256, [&] { spread_rows(backward); });
    hold("of rows", given, out), hold("of gradients", given_rows, d_rows), hold("of weights", given_weights, d_weights);
}

static void activations() {
    const u32 n = 8 * 300;
    const auto gate = draw(n), up = draw(n), dh = draw(n);
    Doubles h, d_gate, d_up;
    for (u32 i = 0; i < n; i++) {
        const double x = to_float(gate[i]), y = to_float(up[i]), d = to_float(dh[i]), s = 1.0 / (1.0 + exp(-x));
        h.push_back(x * s * y), d_gate.push_back(d * y * (s + x * s * (1.0 - s))), d_up.push_back(d * x * s);
    }
    auto given = unwritten(n), given_gate = unwritten(n), given_up = unwritten(n);
    const Swiglu forward = {gate.data(), up.data(), nullptr, given.data(), nullptr, n / 8};
    const Swiglu backward = {gate.data(), up.data(), dh.data(), given_gate.data(), given_up.data(), n / 8};
    printf("activations\n");
    launch(2, 256, [&] { swiglu(forward); });
    launch(2, 256, [&] { swiglu(backward); });
    hold("h", given, h), hold("of gate", given_gate, d_gate), hold("of up", given_up, d_up);
}

static void norms() {
    const u32 rows = 3, width = 2056;
    const auto x = draw(rows * width), dy = draw(rows * width), weight = draw(width);
    Doubles dx(rows * width);
    for (u32 row = 0; row < rows; row++) {
        double square = 0.0, product = 0.0;
        auto at = [&](const std::vector<elem>& of, u32 i) { return double(to_float(of[row * width + i])); };
        for (u32 i = 0; i < width; i++) square += pow(at(x, i), 2), product += at(x, i) * at(dy, i) * to_float(weight[i]);
        const double r = 1.0 / sqrt(square / width + 1e-5);
        for (u32 i = 0; i < width; i++) dx[row * width + i] = r * (at(dy, i) * to_float(weight[i]) - at(x, i) * r * r * product / width);
    }
    auto given = unwritten(rows * width);
    const NormGradient backward = {x.data(), weight.data(), dy.data(), given.data(), width, 1e-5f};
    printf("norms\n");
    launch(rows, 256, [&] { norm_gradient(backward); });
    hold("dx", given, dx);
}

static void losses() {
    const u32 rows = 4, width = 1000;
    std::normal_distribution<float> normal(0.0f, 4.0f);
    std::vector<float> logits(rows * width), sums(rows, NAN), given(rows, NAN), dlosses(rows), given_logits(rows * width, NAN);
    std::vector<u32> targets(rows);
    for (float& v : logits) v = normal(generator);
    logits[5] = -INFINITY;
    Doubles expected, dlogits;
    for (u32 row = 0; row < rows; row++) {
        targets[row] = row * 77 % width, dlosses[row] = 0.5f + row;
        double sum = 0.0;
        for (u32 i = 0; i < width; i++) sum += exp(double(logits[row * width + i]));
        expected.push_back(log(sum) - logits[row * width + targets[row]]);
        for (u32 i = 0; i < width; i++) dlogits.push_back(dlosses[row] * (exp(double(logits[row * width + i])) / sum - (i == targets[row])));
    }
    const Entropy forward = {logits.data(), targets.data(), sums.data(), given.data(), nullptr, nullptr, width};
    const Entropy backward = {logits.data(), targets.data(), sums.data(), nullptr, dlosses.data(), given_logits.data(), width};
    printf("losses\n");
    launch(rows, 256, [&] { cross_entropy(forward); });
    launch(rows, 256, [&] { cross_entropy(backward); });
    hold("losses", given, expected), hold("of logits", given_logits, dlogits);
}

// Four of eight experts in four groups, of which two can be chosen from, with scores that are none: the same rows as in
// the router of lightmoe-models.
static void choices() {
    struct Row {
        bool two_best;
        u32 absent;
        std::vector<float> logits;
        std::vector<u32> expected;
    };
    const Row rows[] = {
        {false, NONE, {1, 1, NAN, 5, 3, 2, NAN, NAN}, {3, 4, 5, 2}},
        {true, NONE, {1, 1, NAN, 5, 3, 2, NAN, NAN}, {4, 5, 0, 1}},
        {true, NONE, {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}, {0, 1, 2, 3}},
        {false, 4, {1, 1, NAN, 5, -INFINITY, 3, NAN, NAN}, {3, 5, 2, 0}},
    };
    printf("choices\n");
    for (const Row& row : rows) {
        u32 position[8], given[4];
        float gates[4];
        for (u32 e = 0; e < 8; e++) position[e] = e == row.absent ? NONE : e;
        const Scores scores = {nullptr, position, 8, 4, 0, 4, 2, row.two_best, 0, 1.0f};
        launch(1, WARP, [&] { choose(scores, row.logits.data(), given, gates); });
        for (u32 i = 0; i < 4; i++) {
            const bool same = given[i] == row.expected[i];
            if (!same) printf("  choice %u: %u for %u FAR\n", i, given[i], row.expected[i]);
            failed |= !same;
        }
    }
}

int main() {
    choices(), sums(), activations(), norms(), losses();
    attention<64>({1, 70, 70, 2, 1, 0, {}, {}, true});
    attention<128>({2, 66, 66, 4, 2, 0, {}, {}, true});
    attention<64>({1, 100, 100, 2, 2, 17, {}, {}, true});
    attention<64>({2, 65, 65, 2, 2, 0, {3, 20}, {65, 40}, true});
    attention<128>({1, 33, 161, 2, 1, 0, {}, {}, false});
    attention<64>({3, 1, 77, 4, 2, 0, {0, 5, 76}, {}, false});
    attention<128>({1, 1, 300, 2, 1, 40, {}, {}, false});
    attention<128>({2, 1, 1, 2, 1, 0, {}, {1, 0}, false});
    attention<64>({2, 3, 90, 2, 1, 10, {0, 80}, {3, 1}, false});
    attention<192>({2, 70, 70, 2, 2, 0, {}, {}, true});
    attention<192>({1, 66, 66, 2, 1, 20, {5}, {60}, true});
    attention<192>({1, 5, 80, 2, 2, 0, {}, {}, false});
    attention<192>({2, 1, 130, 2, 2, 0, {0, 9}, {}, false});
    return failed;
}
