// bf16 products by the tile unit of the CPU (AMX): 16 rows times 32 inputs times 16 outputs in one instruction.
//
// A packed weight is a sequence of such tiles. Rows are multiplied the same way whether there is one or 500, and each
// output adds its products tile by tile, from the first input to the last, so a row's bits depend on the row alone.
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include "packed.hpp"
#include "vectors.hpp"

namespace echelon {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// The shapes of this thread's tiles, as long as the object lives: four tiles of sums, 0 to 3, then inputs and weights.
// Before and after, the unit is unused: other libraries set their own shapes, and the system need not save the tiles.
class TileShapes {
  public:
    TileShapes(int64_t rows_of_0_1_4, int64_t rows_of_2_3_5) {
        Config config;
        for (int tile : {0, 1, 4}) config.rows[tile] = static_cast<uint8_t>(rows_of_0_1_4);
        for (int tile : {2, 3, 5}) config.rows[tile] = static_cast<uint8_t>(rows_of_2_3_5);
        for (int tile : {6, 7}) config.rows[tile] = kPanel;
        for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = kTileRowBytes;
        _tile_loadconfig(&config);
    }
    ~TileShapes() { _tile_release(); }
    TileShapes(const TileShapes&) = delete;

  private:
    struct Config {  // as the instruction reads it
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
};

struct TileOperands {
    const uint16_t* x;
    int64_t x_stride;
    const uint16_t* panels;
    int64_t panel_stride, num_inputs;
};

// Up to 16 rows times four panels, to sums that are `stride` apart: the weights stream by.
inline void multiply_1x4(const TileOperands& from, float* sums, int64_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < from.num_inputs; i += kInputsTogether) {
        const uint16_t* panel = from.panels + i * kPanel;
        _tile_loadd(4, from.x + i, from.x_stride * 2);
        _tile_loadd(6, panel, kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + from.panel_stride, kTileRowBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, panel + 2 * from.panel_stride, kTileRowBytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, panel + 3 * from.panel_stride, kTileRowBytes);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + kPanel, stride * 4);
    _tile_stored(2, sums + 2 * kPanel, stride * 4);
    _tile_stored(3, sums + 3 * kPanel, stride * 4);
}

// 17 to 32 rows times two panels, likewise: each loaded tile serves two products.
inline void multiply_2x2(const TileOperands& from, float* sums, int64_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < from.num_inputs; i += kInputsTogether) {
        const uint16_t* panel = from.panels + i * kPanel;
        _tile_loadd(4, from.x + i, from.x_stride * 2);
        _tile_loadd(6, panel, kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + from.panel_stride, kTileRowBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, from.x + kTileRows * from.x_stride + i, from.x_stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + kPanel, stride * 4);
    _tile_stored(2, sums + kTileRows * stride, stride * 4);
    _tile_stored(3, sums + kTileRows * stride + kPanel, stride * 4);
}

class TiledProduct {
  public:
    TiledProduct(const uint16_t* packed, int64_t num_out, int64_t num_in)
        : packed_(packed), num_out_(num_out), num_in_(num_in), padded_in_(padded_inputs(num_in)) {}

    void run(Pool& pool, const uint16_t* x, int64_t num_rows, int64_t x_stride, const uint16_t* bias,
             uint16_t* y) const {
        const InputRows<uint16_t> rows(pool, num_rows, padded_in_, [&](int64_t row, uint16_t* to) {
            std::copy_n(x + row * x_stride, num_in_, to);
        });
        const int64_t num_panels = padded_panels(num_out_);
        const int64_t cached = kCachedBytes / (padded_in_ * kPanel * 2) / kPanelsTogether * kPanelsTogether;
        const int64_t most = panels_of_chunk(num_panels, pool.num_threads());
        const int64_t group = std::clamp<int64_t>(cached, kPanelsTogether, most);
        pool.run(divide_up(num_panels, group), [&](int64_t chunk) {
            const Range panels{chunk * group, std::min((chunk + 1) * group, num_panels)};
            const int64_t rest = num_rows % kPairRows, pairs_end = num_rows - rest;
            if (pairs_end > 0) multiply_pairs({0, pairs_end}, kTileRows, panels, rows, bias, y);
            if (rest > kTileRows)
                multiply_pairs({pairs_end, num_rows}, rest - kTileRows, panels, rows, bias, y);
            else if (rest > 0)
                multiply_few({pairs_end, num_rows}, panels, rows, bias, y);
        });
    }

  private:
    static constexpr int64_t kPairRows = 2 * kTileRows;
    static constexpr int64_t kCachedBytes = 800000;  // of weights: they stay in the second-level cache while rows pass

    struct Range {
        int64_t begin, end;
    };

    // Up to 16 rows.
    void multiply_few(Range rows, Range panels, const InputRows<uint16_t>& inputs, const uint16_t* bias,
                      uint16_t* y) const {
        const int64_t num_rows = rows.end - rows.begin;
        const TileShapes shapes(num_rows, num_rows);
        alignas(64) float sums[kTileRows * 4 * kPanel];
        for (int64_t panel = panels.begin; panel < panels.end; panel += 4) {
            multiply_1x4(operands(inputs, rows.begin, panel), sums, 4 * kPanel);
            round(sums, num_rows, 4, rows.begin, panel, bias, y);
        }
    }

    // Tiles of 16 rows, and of `second_rows`, in turn.
    void multiply_pairs(Range rows, int64_t second_rows, Range panels, const InputRows<uint16_t>& inputs,
                        const uint16_t* bias, uint16_t* y) const {
        const TileShapes shapes(kTileRows, second_rows);
        alignas(64) float sums[kPairRows * 2 * kPanel];
        for (int64_t row = rows.begin; row < rows.end; row += kPairRows)
            for (int64_t panel = panels.begin; panel < panels.end; panel += 2) {
                multiply_2x2(operands(inputs, row, panel), sums, 2 * kPanel);
                round(sums, kTileRows + second_rows, 2, row, panel, bias, y);
            }
    }

    TileOperands operands(const InputRows<uint16_t>& inputs, int64_t row, int64_t panel) const {
        const int64_t panel_stride = padded_in_ * kPanel;
        return {inputs.at(row), inputs.stride(), packed_ + panel * panel_stride, panel_stride, padded_in_};
    }

    // Writes sums [num_rows][num_panels * kPanel] to their places in y.
    void round(float* sums, int64_t num_rows, int64_t num_panels, int64_t first_row, int64_t first_panel,
               const uint16_t* bias, uint16_t* y) const {
        const int64_t first_out = first_panel * kPanel, num_outs = std::min(num_panels * kPanel, num_out_ - first_out);
        for (int64_t row = 0; row < num_rows; ++row, sums += num_panels * kPanel)
            put_row(y + (first_row + row) * num_out_ + first_out, sums, bias ? bias + first_out : nullptr, num_outs);
    }

    const uint16_t* packed_;
    int64_t num_out_, num_in_, padded_in_;
};

}  // namespace echelon

#endif
