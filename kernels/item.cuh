// What a block works on.
#pragma once

namespace treeattn {

// A query tile of one kv head of one sequence, and the part of it that a block has.
struct alignas(16) Item {
    int head;  // kv head
    int row_tile;
    int first_token;
    int tokens;
    int splits, split, first_block;
    int b;
};

}  // namespace treeattn
