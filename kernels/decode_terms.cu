// Decode on tensor cores where more happens to scores than a scale: windows, softcap, ALiBi, masks; sinks; lists of kv heads.
// One kernel has them all, each looked for at run time: what they cost hides behind the keys' way.
#include "decode_mma.cuh"
#include "weigh.cuh"

namespace treeattn {

// Most dims at which a tile's terms are asked for before its products are made: beyond, there are no registers for both.
constexpr int kEarlyTerms = 128;

template <int HeadDimQk, int HeadDimV, int Rows, bool Bf16K, bool Bf16V>
struct MmaTerms : Mma<HeadDimQk, HeadDimV, Rows, Bf16K, Bf16V, true, SlotTerms<HeadDimQk, HeadDimV, Rows>> {
    using Base = Mma<HeadDimQk, HeadDimV, Rows, Bf16K, Bf16V, true, SlotTerms<HeadDimQk, HeadDimV, Rows>>;
    using typename Base::S;
    using Base::kRowTiles;

    SeenByAll all;

    static __device__ __forceinline__ void stage_query(const DecodeParams& p, const Item& item, char* shared,
                                                       int rows) {
        Base::stage_query(p, item, shared, rows);
        stage_terms_of<S>(p, item, shared, rows);
    }

    __device__ __forceinline__ void begin(const DecodeParams& p, const char* shared) {
        Base::begin(p, shared);
        if constexpr (HeadDimQk <= kEarlyTerms) all.template begin<S>(p, shared);
    }

    __device__ __forceinline__ void attend(const DecodeParams& p, const Tile& tile, const char* shared, uint32_t slot,
                                           const char* stage) {
        const int lane = threadIdx.x % 32;
        const float* scales =
            reinterpret_cast<const float*>(reinterpret_cast<const int*>(shared + S::kRowAt) + Rows) + lane % 4 * 2;
        float scale[kRowTiles][2];
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) scale[t][0] = scales[t * 8], scale[t][1] = scales[t * 8 + 1];
        float s[kRowTiles][4], x[kRowTiles][4];
        TileTerms<kRowTiles> terms;
        if constexpr (HeadDimQk <= kEarlyTerms) terms = ask_terms<S, kRowTiles>(p, all, tile, shared, stage);
        Base::scores(p, s, shared, slot);
        if constexpr (HeadDimQk > kEarlyTerms) {
            all.template begin<S>(p, shared);
            terms = ask_terms<S, kRowTiles>(p, all, tile, shared, stage);
        }
        weigh_tile(p, terms, scale, s, x, static_cast<Base&>(*this));
        if (__any_sync(kAllLanes, terms.bad_position)) {
            if (lane == 0) report_positions<S>(p, tile, shared);
            this->poison();
        }
        // Where a key is hidden from a row, its values are looked at.
        constexpr uint32_t kAll = kRowTiles == 1 ? 0xfu : 0xffu;
        if (__any_sync(kAllLanes, terms.seen != kAll)) {
            const uint32_t keys = Base::keys_not_finite(p, slot);
            if (keys != 0) this->add_row_by_row(x, terms.seen, slot, keys);
        }
        this->accumulate(x, slot);
    }
};

}  // namespace treeattn

#define TREEATTN_TERMS(QK, V, NAME, BF16)                                                                             \
    namespace treeattn {                                                                                              \
    using Terms_d##QK##x##V##_##NAME = MmaTerms<QK, V, 8, BF16, BF16>;                                                \
    }                                                                                                                 \
    TREEATTN_TERMS_KERNEL(treeattn_decode_terms_d##QK##x##V##_r8_##NAME, treeattn::Terms_d##QK##x##V##_##NAME)
TREEATTN_TERMS(64, 64, bf16, true)
TREEATTN_TERMS(64, 64, f16, false)
TREEATTN_TERMS(128, 128, bf16, true)
TREEATTN_TERMS(128, 128, f16, false)
TREEATTN_TERMS(256, 256, bf16, true)
TREEATTN_TERMS(256, 256, f16, false)

TREEATTN_TERMS_ABI(decode_terms)
