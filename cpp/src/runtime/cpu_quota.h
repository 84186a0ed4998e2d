#pragma once

#include <string>

namespace csulora {

/// How many cores the control group of this process may use at a time, rounded up: a container's limit, which the
/// number of the machine's cores does not show. INT_MAX where there is no limit. Read once.
int cpu_quota();

/// The same from the text of a file cpu.max of a control group (version 2), such as "200000 100000" or "max 100000".
int cpu_quota(const std::string& cpu_max);

}  // namespace csulora
