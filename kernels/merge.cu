// Merge of partials that lie in memory: one warp a row, partials in index order.
//
// The same rules as everywhere: the maximum of all log-sum-exps first, then a sum in index order; a partial with -inf
// is empty and its o is never read; a lone partial comes out bit by bit; NaN and +inf make the row NaN. Log-sum-exps of base 2
// are subtracted first and converted to base e afterwards: rounding each of them would change their difference.
#include "numbers.cuh"
#include "params.cuh"
#include "ptx.cuh"

namespace treeattn {

constexpr int kMergeColumns = 8;  // of a lane in one pass over the partials

// The log-sum-exp of one partial, -inf where it is empty: a natural one where there are sums, else in the base that the memory has.
__device__ __forceinline__ double merge_lse(const MergeParams& p, const char* row, const char* sums, int partial) {
    const double lse = p.source.without_others(*reinterpret_cast<const float*>(row + partial * p.step[1]));
    if (sums == nullptr || lse == -infinity()) return lse;
    const double natural = p.source.to_natural == 1.f ? 1.0 : 0.69314718055994530942;
    return lse * natural + log(static_cast<double>(*reinterpret_cast<const float*>(sums + partial * p.step[2])));
}

__device__ __forceinline__ void merge_row(const MergeParams& p, int64_t row) {
    const int lane = threadIdx.x % 32;
    const int64_t token = row / p.heads, head = row % p.heads;
    const RowSource& source = p.source;
    const RowTarget& target = p.target;
    const char* o = source.row(token, head);
    const char* lses = source.lse_of(token, head);
    const char* sums = source.sum == nullptr ? nullptr : source.sum_at(token, head);
    char* out = target.row(token, head);
    const int partials = source.is_padding(token) ? 0 : p.partials;

    double top = -infinity();
    int live = 0;
    bool bad = false;
    for (int i = lane; i < partials; i += 32) {
        const double lse = merge_lse(p, lses, sums, i);
        bad |= !(lse < infinity());
        live += lse != -infinity();
        top = fmax(top, lse);
    }
    bad = __any_sync(kAllLanes, bad);
    for (int d = 16; d > 0; d /= 2) {
        top = fmax(top, __shfl_xor_sync(kAllLanes, top, d));
        live += __shfl_xor_sync(kAllLanes, live, d);
    }

    const double natural = sums != nullptr || source.to_natural == 1.f ? 1.0 : 0.69314718055994530942;
    double sum = 0.0;
    for (int first = 0; first < target.dim; first += 32 * kMergeColumns) {
        float2 acc[kMergeColumns] = {};  // sums of two floats: there may be any number of partials
        sum = 0.0;
        for (int chunk = 0; chunk < partials && !bad; chunk += 32) {
            double lse = -infinity();
            if (chunk + lane < partials) lse = merge_lse(p, lses, sums, chunk + lane);
            const double weight = lse == -infinity() ? 0.0 : exp((lse - top) * natural);
            const bool is_live = lse != -infinity();
            float total = 1.f;
            if (sums != nullptr && is_live) total = *reinterpret_cast<const float*>(sums + (chunk + lane) * p.step[2]);
            for (int i = 0; i < 32 && chunk + i < partials; i++) {
                if (!__shfl_sync(kAllLanes, is_live, i)) continue;
                const double exact = __shfl_sync(kAllLanes, weight, i);
                const float divisor = __shfl_sync(kAllLanes, total, i);
                const float w = static_cast<float>(exact);
                sum += exact;
                const char* from = o + (chunk + i) * p.step[0];
#pragma unroll
                for (int c = 0; c < kMergeColumns; c++) {
                    const int d = first + c * 32 + lane;
                    if (d >= target.dim) continue;
                    float x = load_element(from + d * source.o_stride[2], source.dtype);
                    if (sums != nullptr) x /= divisor;
                    if (live == 1) {
                        acc[c].x = x;
                        continue;
                    }
                    const float product = w * x;
                    add_to(acc[c], product);
                    acc[c].y += fmaf(w, x, -product);
                }
            }
        }
        const double scale = live <= 1 ? 1.0 : 1.0 / sum;
#pragma unroll
        for (int c = 0; c < kMergeColumns; c++) {
            const int d = first + c * 32 + lane;
            if (d >= target.dim) continue;
            float x = acc[c].x;
            if (live > 1 && isfinite(x)) x = static_cast<float>((static_cast<double>(x) + acc[c].y) * scale);
            if (bad) x = not_a_number();
            store_element(out + d * target.o_stride[2], target.dtype, x);
        }
    }
    if (lane == 0 && target.lse != nullptr) {
        float lse = static_cast<float>(live <= 1 ? top * natural : top * natural + log(sum)) * target.from_natural;
        if (bad) lse = not_a_number();
        *target.lse_of(token, head) = lse;
    }
}

}  // namespace treeattn

extern "C" __global__ void __launch_bounds__(treeattn::kRowThreads)
    treeattn_merge_partials(const __grid_constant__ treeattn::MergeParams params) {
    treeattn::dependency_wait();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * treeattn::kRowsABlock + threadIdx.x / 32;
    if (row < static_cast<int64_t>(params.tokens) * params.heads) treeattn::merge_row(params, row);
    treeattn::dependency_launch();
}

TREEATTN_ABI(merge)
