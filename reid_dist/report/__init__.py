"""What people look at: result tables, contact sheets, curves, errors, heat maps, and the page that holds them."""
