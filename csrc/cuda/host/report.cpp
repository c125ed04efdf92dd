// What the machine says of a launch that cannot go on.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "cuda/host/machine.h"

namespace burnish::host {
namespace {

// "lane 7" or "lanes 0-6, 8-31".
std::string ranges(const char* name, const std::vector<unsigned>& numbers) {
  std::string text = say(name, numbers.size() > 1 ? "s " : " ");
  for (size_t i = 0, last; i < numbers.size(); i = last + 1) {
    for (last = i; last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1;) ++last;
    text += say(i == 0 ? "" : ", ", numbers[i]);
    if (last > i) text += say("-", numbers[last]);
  }
  return text;
}

// Threads of a block as "warps 1-2, warp 0 lanes 0-6, 8-31".
std::string warps_and_lanes(const std::vector<unsigned>& threads) {
  std::map<unsigned, std::vector<unsigned>> lanes;
  for (const unsigned thread : threads) lanes[thread / kWarp].push_back(thread % kWarp);
  std::map<std::string, std::vector<unsigned>> warps;  // by which lanes of theirs
  for (const auto& [warp, some] : lanes) {
    const bool whole = some.size() == std::min(kWarp, machine->block_threads - warp * kWarp);
    warps[whole ? "" : ranges(" lane", some)].push_back(warp);
  }
  std::string text;
  for (const auto& [part, same] : warps) text += ranges(", warp", same) + part;
  return text.substr(2);
}

// A function's mangled name, from the symbol table of the library that holds it: dladdr alone knows exported ones.
std::string symbol(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0) return "";
  const std::string file = say(std::ifstream(info.dli_fname, std::ios::binary).rdbuf());
  if (file.size() < sizeof(Elf64_Ehdr)) return "";
  const auto table = [&file]<class T>(T, uint64_t offset, uint64_t count) {
    return std::span(reinterpret_cast<const T*>(file.data() + offset), count);
  };
  const auto header = table(Elf64_Ehdr(), 0, 1)[0];
  const auto sections = table(Elf64_Shdr(), header.e_shoff, header.e_shnum);
  const auto value = static_cast<uint64_t>(static_cast<const char*>(function) - static_cast<char*>(info.dli_fbase));
  for (const Elf64_Shdr& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    for (const auto& entry : table(Elf64_Sym(), section.sh_offset, section.sh_size / sizeof(Elf64_Sym))) {
      if (entry.st_value != value || ELF64_ST_TYPE(entry.st_info) != STT_FUNC) continue;
      return file.data() + sections[section.sh_link].sh_offset + entry.st_name;
    }
  }
  return "";
}

std::string title() {
  const Launch& launch = *machine->launch;
  return say("CUDA on the CPU: ", kernel_name(launch.kernel), ", launched at ", text(launch.where), ", block ",
             text(blockIdx));
}

}  // namespace

std::string text(const uint3& at) { return say("(", at.x, ", ", at.y, ", ", at.z, ")"); }

std::string text(Where where) {
  return say(std::filesystem::path(where.file_name()).filename().string(), ":", where.line());
}

// Without namespaces, return type and parameters: "int8_linear_fwd_kernel<1, 1, 6>".
std::string kernel_name(const void* kernel) {
  const std::string mangled = symbol(kernel);
  char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr);
  std::string name = demangled != nullptr ? demangled : mangled;
  std::free(demangled);
  for (const std::string noise : {"(anonymous namespace)::", "burnish::", "void "}) {
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, noise.size());
  }
  return name.empty() ? "a kernel" : name.substr(0, name.find('('));
}

// What each thread waits for, a block's threads of the same fate together.
void stop_deadlock() {
  std::map<std::pair<unsigned, std::string>, std::vector<unsigned>> fates;
  for (const Thread& thread : machine->threads) {
    const Wait& wait = thread.wait;
    std::string fate = wait.name == nullptr ? "returned" : say("wait in ", wait.name, " at ", text(wait.where));
    const auto& barriers = machine->blocks[thread.block].barriers;
    for (unsigned id = 1; id < kBarriers; ++id) {
      if (wait.barrier == &barriers[id]) fate += say(", barrier ", id);
    }
    if (wait.mask != 0) fate += say(", mask 0x", std::hex, wait.mask);
    fates[{thread.block, fate}].push_back(thread.in_block);
  }
  std::string report = "deadlock";
  for (const auto& [fate, threads] : fates) {
    const std::string at = text(machine->blocks[fate.first].index);
    const std::string block = machine->blocks.size() == 1 ? "" : say("block ", at, " ");
    report += say("; ", block, warps_and_lanes(threads), ": ", fate.second);
  }
  stop_launch(report);
}

void stop_launch(const std::string& what) { throw std::runtime_error(title() + ": " + what); }

void stop_thread(Where where, const std::string& what) {
  throw std::runtime_error(say(title(), ", thread ", text(threadIdx), ", warp ", here().in_block / kWarp, " lane ",
                               lane(), ", ", text(where), ": ", what));
}

}  // namespace burnish::host
