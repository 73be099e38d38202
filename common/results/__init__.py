"""What lands in Results/: tables, pictures, the summary."""
