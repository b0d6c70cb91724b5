"""A function that plugin_bodies uses, in a file of its own: its text counts as well."""


def scaled(x, factor):
    return x * factor
