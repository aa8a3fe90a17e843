// Stands in for cuRAND: numbers of the host's generator.
#include <random>

namespace {
struct Generator { std::mt19937_64 random; };
template <typename T, typename D>
int fill(void* generator, T* to, size_t count, D distribution) {
    for (size_t i = 0; i < count; i++) to[i] = distribution(static_cast<Generator*>(generator)->random);
    return 0;
}
}  // namespace

extern "C" {
int curandCreateGenerator(void** generator, int) { return *generator = new Generator, 0; }
int curandDestroyGenerator(void* generator) { return delete static_cast<Generator*>(generator), 0; }
int curandSetPseudoRandomGeneratorSeed(void* generator, unsigned long long seed) { return static_cast<Generator*>(generator)->random.seed(seed), 0; }
int curandSetStream(void*, void*) { return 0; }
int curandGenerateUniform(void* generator, float* to, size_t count) { return fill(generator, to, count, std::uniform_real_distribution<float>()); }
int curandGenerateUniformDouble(void* generator, double* to, size_t count) { return fill(generator, to, count, std::uniform_real_distribution<double>()); }
int curandGenerateNormal(void* generator, float* to, size_t count, float mean, float deviation) { return fill(generator, to, count, std::normal_distribution<float>(mean, deviation)); }
int curandGenerateNormalDouble(void* generator, double* to, size_t count, double mean, double deviation) { return fill(generator, to, count, std::normal_distribution<double>(mean, deviation)); }
}
