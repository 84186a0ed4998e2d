#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "linalg/conversion.h"

namespace {

/// Every value of a type of 16 bits, there and back.
template <typename Stored>
void check_every_value(c10::ScalarType dtype) {
  std::vector<uint16_t> bits(1 << 16), back(bits.size());
  std::iota(bits.begin(), bits.end(), uint16_t{0});
  std::vector<float> wide(bits.size());
  const int64_t columns = 67;  // no multiple of any vector
  const int64_t rows = static_cast<int64_t>(bits.size()) / columns;
  csulora::widen(bits.data(), dtype, columns, csulora::contiguous_view(wide.data(), rows, columns));
  csulora::narrow({wide.data(), rows, columns, columns}, dtype, back.data(), columns);
  int64_t different = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float expected = Stored(bits[i], Stored::from_bits());
    const bool is_same = std::isnan(expected) ? std::isnan(wide[i]) : expected == wide[i] && bits[i] == back[i];
    different += is_same ? 0 : 1;
  }
  CHECK(different == 0);
}

TEST_CASE("every float16 and bfloat16 is widened and narrowed to itself") {
  check_every_value<c10::Half>(c10::kHalf);
  check_every_value<c10::BFloat16>(c10::kBFloat16);
}

TEST_CASE("narrowing rounds to even, leaves gaps out and tells the largest magnitude") {
  const std::vector<float> entries{1.0F + 0x1p-11F, -7, 99, 1.0F + 3 * 0x1p-11F, 0, 99};
  std::vector<uint16_t> halves(4);
  CHECK(csulora::narrow({entries.data(), 2, 2, 3}, c10::kHalf, halves.data(), 2) == 7);
  CHECK(halves == std::vector<uint16_t>{0x3c00, 0xc700, 0x3c02, 0});
  const std::vector<float> broken{1, std::nanf("")};
  CHECK(std::isnan(csulora::narrow({broken.data(), 1, 2, 2}, c10::kHalf, halves.data(), 2)));
}

}  // namespace
