"""What a run tells: events, summary, tables, plots."""
