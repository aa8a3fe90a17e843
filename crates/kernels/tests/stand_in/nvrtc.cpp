// Stands in for NVRTC. What it gives for machine code is the path of a library of the host, with zeros behind it that make
// it as long as machine code is at least.
#include "library.h"
#include <cstring>

namespace {
struct Program { std::string text; Library made; };

int give(const std::string& text, char* to) {
    memcpy(to, text.data(), text.size() + 1);
    return 0;
}
int give_size(const std::string& text, size_t* size) {
    *size = text.size() + 1;
    return 0;
}
}  // namespace

extern "C" {
int nvrtcVersion(int* major, int* minor) { return *major = 0, *minor = int(version() % 1000000000), 0; }
const char* nvrtcGetErrorString(int) { return "the stand-in for NVRTC could not compile it"; }
int nvrtcCreateProgram(Program** program, const char* text, const char*, int, const char* const*, const char* const*) {
    *program = new Program{text};
    return 0;
}
int nvrtcDestroyProgram(Program** program) { return delete *program, *program = nullptr, 0; }
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    std::string defines;
    for (int i = 0; i < count; i++)
        if (std::string option = options[i]; option.rfind("--define-macro=", 0) == 0) defines += " -D" + option.substr(15);
    program->made = make(program->text, "device.h", defines);
    if (program->made.path.empty()) return 6;
    program->made.path.resize(4096);
    return 0;
}
int nvrtcGetProgramLogSize(Program* p, size_t* size) { return give_size(p->made.log, size); }
int nvrtcGetProgramLog(Program* p, char* to) { return give(p->made.log, to); }
int nvrtcGetCUBINSize(Program* p, size_t* size) { return give_size(p->made.path, size); }
int nvrtcGetCUBIN(Program* p, char* to) { return give(p->made.path, to); }
int nvrtcGetPTXSize(Program* p, size_t* size) { return give_size(p->made.path, size); }
int nvrtcGetPTX(Program* p, char* to) { return give(p->made.path, to); }
}
