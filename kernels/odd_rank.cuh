// Whom to blame where ranks differ in what step they are in.
#pragma once

#include <stdint.h>

namespace treeattn {

// The first rank outside the largest party or, where no party is the largest, the first that differs from `me`
// (attention::odd_ranks); `me` where all agree. `at(rank)` tells parties apart. One thread.
template <class At>
__device__ __forceinline__ int odd_rank(int world, int me, const At& at) {
    const auto party = [&](int rank) {
        int size = 0;
        for (int other = 0; other < world; other++) size += at(other) == at(rank);
        return size;
    };
    int most = 0;
    for (int rank = 0; rank < world; rank++) most = max(most, party(rank));
    uint64_t right = 0;
    bool found = false, single = true;
    for (int rank = 0; rank < world; rank++) {
        if (party(rank) < most) continue;
        single &= !found || at(rank) == right;
        if (!found) right = at(rank);
        found = true;
    }
    if (!single) right = at(me);
    for (int rank = 0; rank < world; rank++) {
        if (at(rank) != right) return rank;
    }
    return me;
}

}  // namespace treeattn
