"""What masked image modelling predicts, behind one seam (`base.Target`)."""
