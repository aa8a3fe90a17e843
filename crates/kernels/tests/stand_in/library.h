// Makes libraries of the host of kernels' text, by the C++ compiler (CXX, or c++), with device.h in front, which lies
// beside the library that asks for it. What was made before is found again.
#pragma once
#include <cstdlib>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <unistd.h>

namespace {
namespace fs = std::filesystem;

// Where a library is, and what the compiler said; no path if it could not be made.
struct Library { std::string path, log; };

std::string read(const fs::path& path) {
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
}
fs::path folder() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(folder), &info);
    return fs::absolute(info.dli_fname).parent_path();
}
const char* const HEADERS[] = {"device.h", "floats.h", "candle.h", "library.h", "include/cuda_fp16.h", "include/cuda_bf16.h", "include/cuda_fp8.h", "include/cuda/std/limits"};

// A number of all that libraries are made with.
size_t version() {
    static const size_t number = [] {
        std::string all;
        for (const char* name : HEADERS) all += read(folder() / name);
        return std::hash<std::string>()(all);
    }();
    return number;
}

// The library of `text`, which includes `front` and is compiled with `options`.
Library make(std::string text, const std::string& front, const std::string& options) {
    static std::mutex lock;
    std::lock_guard<std::mutex> held(lock);
    // Memory that a launch gives to a block has one place for each block.
    text = std::regex_replace(text, std::regex(R"(extern __shared__ (?:__align__\(\d+\) )?([a-z0-9 ]+?) (\w+)\[\];)"),
                              "\n#define $2 (reinterpret_cast<$1*>(emulation::block->dynamic))\n");
    char place[32];
    snprintf(place, sizeof place, "/%016zx", std::hash<std::string>()(text + front + options) ^ version() * 31);
    const std::string ready = folder().string() + place;
    Library made{ready + "/kernels.so", ""};
    if (fs::exists(made.path)) return made;
    const std::string path = ready + "-" + std::to_string(getpid());
    fs::create_directories(path);
    std::ofstream(path + "/kernels.cu") << text;
    const char* named = getenv("CXX");
    const std::string compiler = (named && *named ? named : "c++") + std::string(" -std=c++20 -w ") + options + " -I" + folder().string() + " ";
    auto run = [&](const std::string& arguments) {
        const bool done = system((compiler + arguments + " >>" + path + "/log 2>&1").c_str()) == 0;
        made.log = read(path + "/log");
        return done;
    };
    // Kernels are found where macros have become text.
    if (!run("-DON_HOST -E -P -x c++ " + path + "/kernels.cu -o " + path + "/kernels.i")) return {"", made.log};
    const std::string plain = read(path + "/kernels.i");
    std::set<std::string> names;
    const std::regex kernel(R"(__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\()");
    for (std::sregex_iterator i(plain.begin(), plain.end(), kernel), end; i != end; ++i) names.insert((*i)[1]);
    std::ofstream whole(path + "/kernels.cpp");
    whole << "#include \"" << front << "\"\n#define SEEN extern \"C\" __attribute__((visibility(\"default\")))\n"
             "SEEN void launch_blocks(const u32* grid, const u32* size, u32 dynamic, const std::function<void()>& kernel) {\n"
             "    launch({grid[0], grid[1], grid[2]}, {size[0], size[1], size[2]}, dynamic, kernel);\n}\n#include \"kernels.cu\"\n";
    for (const auto& name : names) whole << "SEEN std::function<void()>* bind_" << name << "(void** given) { return bound(" << name << ", given); }\n";
    whole.close();
    // Kernels read numbers of one type as those of another.
    if (!run("-O2 -march=native -fno-strict-aliasing -fPIC -shared -fno-gnu-unique -fvisibility=hidden " + path + "/kernels.cpp -o " + path + "/kernels.so -pthread")) return {"", made.log};
    // Another process may have been first.
    std::error_code taken;
    fs::rename(path, ready, taken);
    if (taken) fs::remove_all(path);
    return made;
}
}  // namespace
