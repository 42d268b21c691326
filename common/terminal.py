"""The width of text in a terminal."""

import unicodedata


def text_width(text):
  """Returns how many columns of a terminal a text takes; many Asian characters take two."""
  return sum(0 if unicodedata.category(character) in ('Mn', 'Me', 'Cf') else
             2 if unicodedata.east_asian_width(character) in 'WF' else 1
             for character in text)


def pad(text, width):
  """Returns the text, followed by as many spaces as it lacks to take `width` columns."""
  return text + ' ' * (width - text_width(text))
