#include "runtime/cpu_quota.h"

#include <algorithm>
#include <climits>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace csulora {
namespace {

/// The path of this process's control group below the mounted hierarchy; within a container often "/".
std::string control_group() {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("0::/")) {  // version 2
      return line.substr(4);
    }
  }
  return {};
}

/// The least quota of the control group and of those that it lies in.
int read_quota() {
  const std::filesystem::path root("/sys/fs/cgroup");
  auto group = root / control_group();
  int quota = INT_MAX;
  for (;; group = group.parent_path()) {
    std::ifstream file(group / "cpu.max");
    std::stringstream text;
    text << file.rdbuf();
    quota = std::min(quota, cpu_quota(text.str()));
    if (group == root || group == group.parent_path()) {
      return quota;
    }
  }
}

}  // namespace

int cpu_quota(const std::string& cpu_max) {
  long quota = 0, period = 0;
  std::istringstream text(cpu_max);
  if (!(text >> quota >> period) || quota <= 0 || period <= 0) {  // "max", or no such file
    return INT_MAX;
  }
  return static_cast<int>(std::clamp<long>((quota + period - 1) / period, 1, INT_MAX));
}

int cpu_quota() {
  static const int quota = read_quota();
  return quota;
}

}  // namespace csulora
