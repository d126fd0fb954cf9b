// Keyword arguments of a call from Python, read by name. A missing one and one that nobody reads are
// both errors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace rapfast {

class Arguments {
 public:
  explicit Arguments(const pybind11::kwargs& values) : values_(values) {}

  template <typename T>
  T get(const char* name) {
    ++read_;
    PyObject* value = PyDict_GetItemString(values_.ptr(), name);
    if (value == nullptr) throw pybind11::type_error(std::string("missing argument ") + name);
    return pybind11::handle(value).cast<T>();
  }

  // A tensor's address, 0 for an absent one.
  template <typename T>
  T* pointer(const char* name) {
    return reinterpret_cast<T*>(get<uintptr_t>(name));
  }

  // Call after the last get.
  void finish() const {
    if (read_ != values_.size()) {
      throw pybind11::type_error("rapfast._C takes " + std::to_string(read_) + " arguments here, got " +
                                 std::to_string(values_.size()));
    }
  }

 private:
  const pybind11::kwargs& values_;
  size_t read_ = 0;
};

}  // namespace rapfast
