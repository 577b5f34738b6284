"""A reward for the tests of conversations."""


def score(prompts: list[str], responses: list[str]) -> list[float]:
  """The length of the response."""
  del prompts
  return [float(len(response)) for response in responses]
