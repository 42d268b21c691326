"""Shortens TensorFlow's errors to what a user can act on."""


def reason(error):
  """Returns one line that says why an operation failed.

  Args:
    error: tf.errors.OpError, or another exception of a session or a saver.
  """
  message = getattr(error, 'message', None) or str(error)
  # The reason comes before the name of the failing operation.
  lines = message.split('[[{{node')[0].strip().splitlines()
  return lines[-1] if lines else type(error).__name__
