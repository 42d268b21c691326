"""Measurements that take turns, so that a slow minute of the machine hits all of them."""

import statistics


def take_turns(functions, num_rounds):
  """Calls functions in turns.

  Args:
    functions: {name: function that returns a number}.
    num_rounds: how often each is called.

  Returns:
    {name: median of what it returned}.
  """
  return {name: statistics.median(values)
          for name, values in record_turns(functions, num_rounds).items()}


def record_turns(functions, num_rounds):
  """Returns {name: list of what the function returned}; see `take_turns`."""
  results = {name: [] for name in functions}
  for _ in range(num_rounds):
    for name, function in functions.items():
      results[name].append(function())
  return results
