// Stands in for cuBLAS: products of matrices, which lie by columns, with sums as f32 or as f64.
#include "floats.h"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {
enum { DONE = 0, INVALID_VALUE = 7 };
enum { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };
enum { SUMS_AS_F32 = 68, SUMS_AS_F64 = 70, PEDANTIC = 1 };

double get(const void* p, int type, long long i) {
    switch (type) {
        case F32: return static_cast<const float*>(p)[i];
        case F64: return static_cast<const double*>(p)[i];
        case F16: return f16_to_float(static_cast<const unsigned short*>(p)[i]);
        case BF16: return bf16_to_float(static_cast<const unsigned short*>(p)[i]);
        default: return fprintf(stderr, "numbers of type %d have no stand-in\n", type), abort(), 0;
    }
}
void set(void* p, int type, long long i, double v) {
    switch (type) {
        case F32: static_cast<float*>(p)[i] = float(v); break;
        case F64: static_cast<double*>(p)[i] = v; break;
        case F16: static_cast<unsigned short*>(p)[i] = f16_of_float(float(v)); break;
        default: static_cast<unsigned short*>(p)[i] = bf16_of_float(float(v));
    }
}
struct Matrix {
    void* at;
    int type;
    bool turned;
    int step;  // from a column to the next
    long long start;

    long long place(int row, int column) const { return start + (turned ? column + 1ll * row * step : row + 1ll * column * step); }
    double operator()(int row, int column) const { return get(at, type, place(row, column)); }
};

// c = scale * a * b + keep * c of a [m, k] and b [k, n].
template <typename Sum>
void multiply(const Matrix& a, const Matrix& b, const Matrix& c, int m, int n, int k, double scale, double keep) {
    std::vector<Sum> columns(size_t(m) * k);
    for (int p = 0; p < k; p++)
        for (int i = 0; i < m; i++) columns[size_t(p) * m + i] = Sum(a(i, p));
    std::vector<Sum> sums(m);
    for (int j = 0; j < n; j++) {
        std::fill(sums.begin(), sums.end(), Sum(0));
        for (int p = 0; p < k; p++) {
            const Sum factor = Sum(b(p, j));
            const Sum* column = &columns[size_t(p) * m];
            for (int i = 0; i < m; i++) sums[i] += column[i] * factor;
        }
        // What is not kept may be no number.
        for (int i = 0; i < m; i++) set(c.at, c.type, c.place(i, j), scale * sums[i] + (keep ? keep * c(i, j) : 0));
    }
}
}  // namespace

extern "C" {
int cublasCreate_v2(void** handle) { return *handle = new int, DONE; }
int cublasDestroy_v2(void* handle) { return delete static_cast<int*>(handle), DONE; }
int cublasSetStream_v2(void*, void*) { return DONE; }
int cublasGemmStridedBatchedEx(void*, int turn_a, int turn_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int step_a, long long next_a,
                               const void* b, int type_b, int step_b, long long next_b, const void* beta, void* c, int type_c, int step_c, long long next_c,
                               int count, int sums, int) {
    if (m < 0 || n < 0 || k < 0 || step_a < std::max(1, turn_a ? k : m) || step_b < std::max(1, turn_b ? n : k) || step_c < std::max(1, m)) return INVALID_VALUE;
    // The type of the factors; sums as f16 are f32 here.
    const int type = sums < SUMS_AS_F32 ? F16 : (sums & ~PEDANTIC) == SUMS_AS_F64 ? F64 : F32;
    const double scale = get(alpha, type, 0), keep = get(beta, type, 0);
    for (int i = 0; i < count; i++) {
        const Matrix of_a{const_cast<void*>(a), type_a, turn_a != 0, step_a, i * next_a}, of_b{const_cast<void*>(b), type_b, turn_b != 0, step_b, i * next_b};
        const Matrix of_c{c, type_c, false, step_c, i * next_c};
        if (type == F64) multiply<double>(of_a, of_b, of_c, m, n, k, scale, keep);
        else multiply<float>(of_a, of_b, of_c, m, n, k, scale, keep);
    }
    return DONE;
}
int cublasDgemmStridedBatched(void* handle, int turn_a, int turn_b, int m, int n, int k, const double* alpha, const double* a, int step_a, long long next_a,
                              const double* b, int step_b, long long next_b, const double* beta, double* c, int step_c, long long next_c, int count) {
    return cublasGemmStridedBatchedEx(handle, turn_a, turn_b, m, n, k, alpha, a, F64, step_a, next_a, b, F64, step_b, next_b, beta, c, F64, step_c, next_c, count, SUMS_AS_F64, 0);
}
}
