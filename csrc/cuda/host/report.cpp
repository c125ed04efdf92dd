// What the machine says of a launch that cannot go on.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "cuda/host/machine.h"
#include "cuda/host/state.h"

namespace burnish::host {
namespace {

// Threads as ranges: "0-31, 40".
std::string ranges(const std::vector<unsigned>& numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    out << (i == 0 ? "" : ", ") << numbers[i];
    if (last > i) out << "-" << numbers[last];
    i = last + 1;
  }
  return out.str();
}

// Threads of a block as "warps 1-2, warp 0 lanes 0-6, 8-31".
std::string warps_and_lanes(const std::vector<unsigned>& threads) {
  std::map<unsigned, std::vector<unsigned>> lanes;
  for (const unsigned thread : threads) lanes[thread / kWarp].push_back(thread % kWarp);
  std::vector<unsigned> whole;
  std::string parts;
  for (const auto& [warp, some] : lanes) {
    if (some.size() == std::min(kWarp, machine->block_threads - warp * kWarp)) {
      whole.push_back(warp);
    } else {
      parts += ", warp " + std::to_string(warp) + (some.size() > 1 ? " lanes " : " lane ") + ranges(some);
    }
  }
  if (!whole.empty()) parts = (whole.size() > 1 ? ", warps " : ", warp ") + ranges(whole) + parts;
  return parts.substr(2);
}

template <class T>
std::vector<T> read_table(std::ifstream& file, uint64_t offset, uint64_t bytes) {
  std::vector<T> table(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(offset));
  file.read(reinterpret_cast<char*>(table.data()), static_cast<std::streamsize>(table.size() * sizeof(T)));
  return table;
}

// A function's mangled name, from the symbol table of the library that holds it: dladdr alone knows exported ones.
std::string symbol(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0) return "";
  std::ifstream file(info.dli_fname, std::ios::binary);
  const auto header = read_table<Elf64_Ehdr>(file, 0, sizeof(Elf64_Ehdr));
  const auto sections = read_table<Elf64_Shdr>(file, header[0].e_shoff, header[0].e_shnum * sizeof(Elf64_Shdr));
  const auto value = static_cast<uint64_t>(static_cast<const char*>(function) - static_cast<char*>(info.dli_fbase));
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB || !file) continue;
    const Elf64_Shdr& names = sections[section.sh_link];
    const auto text = read_table<char>(file, names.sh_offset, names.sh_size);
    for (const auto& entry : read_table<Elf64_Sym>(file, section.sh_offset, section.sh_size)) {
      if (entry.st_value == value && ELF64_ST_TYPE(entry.st_info) == STT_FUNC) return text.data() + entry.st_name;
    }
  }
  return "";
}

}  // namespace

std::string text(const uint3& at) {
  return std::string("(") + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string text(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

// Without namespaces, return type and parameters: "int8_linear_fwd_kernel<1, 1, 6>".
std::string kernel_name(const void* kernel) {
  const std::string mangled = symbol(kernel);
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = demangled != nullptr ? demangled : mangled;
  std::free(demangled);
  for (const std::string noise : {"(anonymous namespace)::", "burnish::", "void "}) {
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, noise.size());
  }
  return name.empty() ? "a kernel" : name.substr(0, name.find('('));
}

std::string title() {
  const Launch& launch = *machine->launch;
  return "CUDA on the CPU: " + kernel_name(launch.kernel) + ", launched at " + text(launch.where) + ", block " +
         text(blockIdx);
}

// What each thread waits for, a block's threads of the same fate together.
std::string deadlock() {
  std::map<std::pair<unsigned, std::string>, std::vector<unsigned>> fates;
  for (unsigned i = 0; i < machine->threads.size(); ++i) {
    const Thread& thread = machine->threads[i];
    std::ostringstream fate;
    if (thread.state == State::kDone) {
      fate << "returned";
    } else {
      fate << "wait in " << thread.name << " at " << text(thread.where);
      if (thread.state == State::kBarrier && thread.barrier != 0) fate << ", barrier " << thread.barrier;
      if (thread.state == State::kCollective) fate << ", mask 0x" << std::hex << thread.mask;
    }
    fates[{thread.block, fate.str()}].push_back(i % machine->block_threads);
  }
  std::string report = title() + ": deadlock";
  for (const auto& [fate, threads] : fates) {
    const bool one = machine->blocks.size() == 1;
    report += (one ? "; " : "; block " + text(machine->blocks[fate.first].index) + " ") + warps_and_lanes(threads) +
              ": " + fate.second;
  }
  return report;
}

void stop(const std::string& what, Where where) {
  throw std::runtime_error(title() + ", thread " + text(threadIdx) + ", warp " +
                           std::to_string(in_own_block() / kWarp) + " lane " + std::to_string(in_own_block() % kWarp) +
                           ", " + text(where) + ": " + what);
}

}  // namespace burnish::host
