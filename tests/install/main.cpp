// A C++ program that knows only the installed headers and library.
#include <cstdio>

#include <treeattn.hpp>

int main()
{
    try {
        const auto runtime = treeattn::Runtime::create();
        const auto comms = treeattn::Communicator::create_local(runtime, {TREEATTN_CPU(0), TREEATTN_CPU(0)});
        std::printf("treeattn %s: %d ranks\n", treeattn_version(), comms.at(1).world());
        return 0;
    } catch (const treeattn::Error &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
