"""The paper's tables, from a preset to committed files: which runs there are, running them, scoring, rendering."""
