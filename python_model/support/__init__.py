"""What every room uses: argument checks, atomic files, resumable results."""
