#include "self_test.h"

#include <cstdint>
#include <vector>

namespace penstock {
namespace {

// Rows and features enough for blocks of 16 rows and for rests of all kinds.
constexpr int64_t rows = 37, outputs = 80, features = 200;

// Numbers without a pattern (Knuth's multiplicative generator).
class Numbers {
  public:
    uint8_t byte() { return static_cast<uint8_t>((state_ = state_ * 6364136223846793005u + 1442695040888963407u) >> 56); }

  private:
    uint64_t state_ = 7;
};

// What `table` makes of the same int8 product.
std::vector<float> product(const KernelTable& table) {
    Numbers numbers;
    std::vector<uint8_t> codes(outputs * features);
    for (uint8_t& code : codes) code = numbers.byte();
    std::vector<float> weight_scales(outputs, 0.5f), x(rows * features), output(rows * outputs);
    for (float& value : x) value = static_cast<float>(numbers.byte()) - 128.0f;
    constexpr int64_t stride = 256;
    std::vector<int8_t> data(rows * stride);
    std::vector<float> scales(rows);
    std::vector<int32_t> sums(rows);
    const Rows input{ROW_INT8, features, features, stride, data.data(), scales.data(), sums.data(), nullptr};
    for (int64_t row = 0; row < rows; ++row) table.emit_row(x.data() + row * features, input, row);
    const PackedWeight weight{WEIGHT_INT8, features, outputs, features, codes.data(), weight_scales.data(), nullptr, nullptr, nullptr};
    const LinearCall call{&weight, &input, rows, output.data(), outputs, false};
    const int64_t tiles = table.linear_tiles(call);
    for (int64_t tile = 0; tile < tiles; ++tile) table.linear_tile(call, tile);
    return output;
}

}  // namespace

bool self_test(const KernelTable& table, const KernelTable& reference) { return product(table) == product(reference); }

}  // namespace penstock
