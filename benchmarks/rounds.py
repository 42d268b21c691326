"""Alternating measurements: a slow minute of the machine affects all of them."""

import statistics


def take_turns(functions, num_rounds):
  """Calls functions in turn.

  Args:
    functions: {name: function that returns a number}.
    num_rounds: number of calls of each.

  Returns:
    {name: median of the results}.
  """
  return {name: statistics.median(values)
          for name, values in record_turns(functions, num_rounds).items()}


def record_turns(functions, num_rounds):
  """Returns {name: list of the results}; see `take_turns`."""
  results = {name: [] for name in functions}
  for _ in range(num_rounds):
    for name, function in functions.items():
      results[name].append(function())
  return results
