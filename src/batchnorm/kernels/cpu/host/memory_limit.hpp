// How much memory this process may have: the machine's, or less where control groups say so.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

namespace batchnorm {
namespace {

// A limit that a file holds; without one (the file is not there, or says "max") all there is.
uint64_t limit_in(const std::string& file) {
  unsigned long long limit = 0;
  std::ifstream stream(file);
  return stream >> limit ? limit : UINT64_MAX;
}

// The least limit of the control groups that this process is in: its own and those around it, versions 2 and 1. Inside a
// container the path may be the host's: then only the outermost is there, and it is the container's. `root` is where the
// system's own files are.
uint64_t control_groups_limit(const std::string& root) {
  uint64_t least = UINT64_MAX;
  std::ifstream lines(root + "/proc/self/cgroup");
  for (std::string line; std::getline(lines, line);) {  // number:controllers:path
    const auto first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = std::string(",").append(line, first + 1, second - first - 1).append(",");
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",memory,") == std::string::npos) continue;
    const std::string mounted = root + (unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    std::string path = line.substr(second + 1);
    while (true) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      least = std::min(least, limit_in(mounted + path + (unified ? "/memory.max" : "/memory.limit_in_bytes")));
      if (path.empty()) break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return least;
}

uint64_t memory_limit(const std::string& root = "") {
  const auto machine = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return std::min(machine, control_groups_limit(root));
}

}  // namespace
}  // namespace batchnorm
