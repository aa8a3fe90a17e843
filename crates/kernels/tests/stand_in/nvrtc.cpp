// Stands in for NVRTC: kernels become a library of the host by the C++ compiler (CXX, or c++), with device.h, which lies
// beside this library, in front. What it gives for machine code is the library's path, beneath that folder.
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <functional>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <unistd.h>

namespace fs = std::filesystem;
namespace {
struct Program { std::string text, name, log, image; };

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
int give(const std::string& text, char* to) {
    memcpy(to, text.c_str(), text.size() + 1);
    return 0;
}
int give_size(const std::string& text, size_t* size) {
    *size = text.size() + 1;
    return 0;
}
}  // namespace

extern "C" {
int nvrtcVersion(int* major, int* minor) { return *major = 0, *minor = int(std::hash<std::string>()(read(folder() / "device.h")) % 1000000000), 0; }
const char* nvrtcGetErrorString(int) { return "the stand-in for NVRTC could not compile it"; }
int nvrtcCreateProgram(Program** program, const char* text, const char* name, int, const char* const*, const char* const*) {
    *program = new Program{text, name};
    return 0;
}
int nvrtcDestroyProgram(Program** program) { return delete *program, *program = nullptr, 0; }
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    std::string defines;
    for (int i = 0; i < count; i++)
        if (std::string option = options[i]; option.rfind("--define-macro=", 0) == 0) defines += " -D" + option.substr(15);
    // Memory that a launch gives to a block has one place for each block.
    std::string text = std::regex_replace(program->text, std::regex(R"(extern __shared__ (?:__align__\(\d+\) )?([a-z0-9 ]+?) (\w+)\[\];)"),
                                          "\n#define $2 (reinterpret_cast<$1*>(emulation::block->dynamic))\n");
    const char* named = getenv("CXX");
    char place[32];
    snprintf(place, sizeof place, "/%016zx", std::hash<std::string>()(text + defines + read(folder() / "device.h")));
    const std::string ready = folder().string() + place;
    program->image = ready + "/kernels.so";
    if (fs::exists(program->image)) return 0;
    const std::string path = ready + "-" + std::to_string(getpid());
    fs::create_directories(path);
    std::ofstream(path + "/kernels.cu") << text;
    const std::string compiler = (named && *named ? named : "c++") + std::string(" -std=c++20 -w") + defines + " -I" + folder().string() + " ";
    auto run = [&](const std::string& arguments) {
        const int done = system((compiler + arguments + " >>" + path + "/log 2>&1").c_str());
        program->log = read(path + "/log");
        return done == 0;
    };
    // Kernels are found where macros have become text.
    if (!run("-DON_HOST -E -P -x c++ " + path + "/kernels.cu -o " + path + "/kernels.i")) return 6;
    const std::string plain = read(path + "/kernels.i");
    std::set<std::string> names;
    const std::regex kernel(R"(__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\()");
    for (std::sregex_iterator i(plain.begin(), plain.end(), kernel), end; i != end; ++i) names.insert((*i)[1]);
    std::ofstream whole(path + "/kernels.cpp");
    whole << "#include \"device.h\"\n" << plain;
    for (const auto& name : names)
        whole << "\nextern \"C\" __attribute__((visibility(\"default\"))) std::function<void()>* bind_" << name << "(void** given) { return bound(" << name << ", given); }\n";
    whole << "extern \"C\" __attribute__((visibility(\"default\"))) void launch_blocks(u32 grid, u32 size, u32 shared, const std::function<void()>& kernel) { launch(grid, size, shared, kernel); }\n";
    whole.close();
    if (!run("-O2 -march=native -fPIC -shared -fno-gnu-unique -fvisibility=hidden " + path + "/kernels.cpp -o " + path + "/kernels.so -pthread")) return 6;
    // Another process may have been first.
    std::error_code taken;
    fs::rename(path, ready, taken);
    if (taken) fs::remove_all(path);
    return 0;
}
int nvrtcGetProgramLogSize(Program* p, size_t* size) { return give_size(p->log, size); }
int nvrtcGetProgramLog(Program* p, char* to) { return give(p->log, to); }
int nvrtcGetCUBINSize(Program* p, size_t* size) { return give_size(p->image, size); }
int nvrtcGetCUBIN(Program* p, char* to) { return give(p->image, to); }
int nvrtcGetPTXSize(Program* p, size_t* size) { return give_size(p->image, size); }
int nvrtcGetPTX(Program* p, char* to) { return give(p->image, to); }
}
