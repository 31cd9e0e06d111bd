"""Where a model comes from and where it is cut: names, files, the built-in models. Loads no torch until it must."""
