// Weights of 4 and 8 bits, as quantized.cpp packs them.
#pragma once

#include "packed.hpp"

namespace echelon {

// As in kernels/native/quantized.py.
struct PackedCodes {
    const uint8_t* codes;
    const float* scales;  // [panels][groups][kPanel]
    const float* zeros;   // like scales; null: none
    const float* table;   // the values of codes of 4 bits
    int64_t group_size;
    int64_t most_direct_rows;  // with more, the weight is expanded for the products of linear.cpp
};

struct Weight : PackedCodes {
    int64_t num_out, num_in;

    int64_t num_groups() const { return divide_up(padded_inputs(num_in), group_size); }
};

}  // namespace echelon
