"""What a machine lacks for a run, found before the run does: checks that look and never change anything."""
