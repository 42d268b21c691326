"""Terminals: the width of text, and what happens when one is closed."""

import signal
import unicodedata


def text_width(text):
  """Returns how many columns of a terminal a text takes; many Asian characters take two."""
  return sum(0 if unicodedata.category(character) in ('Mn', 'Me', 'Cf') else
             2 if unicodedata.east_asian_width(character) in 'WF' else 1
             for character in text)


def pad(text, width):
  """Returns the text, followed by as many spaces as it lacks to take `width` columns."""
  return text + ' ' * (width - text_width(text))


def interrupt_on_kill():
  """Makes kill and a closed terminal end a script as Ctrl-C does, so that it can clean up."""
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets
    signal.signal(signal.SIGHUP, signal.default_int_handler)
