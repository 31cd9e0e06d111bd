"""How much of a text an attack recovered, beside what it would get without having seen anything."""
