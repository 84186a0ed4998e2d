#pragma once

#include <stdexcept>

namespace csulora {

/// Base class of every exception that csulora throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What the caller passed is malformed or does not fit together; the message says what, where and what to do.
class InputError : public Error {
 public:
  using Error::Error;
};

/// A promise csulora makes to itself was broken: a bug in csulora, not in the caller's input.
class InternalError : public Error {
 public:
  using Error::Error;
};

/// The GPU, its driver or one of its libraries failed a call.
class DeviceError : public InternalError {
 public:
  using InternalError::InternalError;
};

/// The GPU's memory ran out: free some, or correct and extract less at once.
class DeviceMemoryError : public DeviceError {
 public:
  using DeviceError::DeviceError;
};

}  // namespace csulora
