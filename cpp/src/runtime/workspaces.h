#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "csulora/extract.h"

namespace csulora {

/// Workspaces for work on several threads: as many as are in use at a time, each used again and again.
class Workspaces {
 public:
  using Lent = std::unique_ptr<Workspace, std::function<void(Workspace*)>>;

  /// A workspace that comes back when the pointer goes.
  Lent lend() {
    const std::lock_guard lock(mutex_);
    auto workspace = free_.empty() ? std::make_unique<Workspace>() : std::move(free_.back());
    if (!free_.empty()) {
      free_.pop_back();
    }
    return Lent(workspace.release(), [this](Workspace* returned) {
      const std::lock_guard returning(mutex_);
      free_.emplace_back(returned);
    });
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

}  // namespace csulora
