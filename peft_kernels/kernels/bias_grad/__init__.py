"""The bias gradient: dbias = dy.sum(0), and a linear whose backward makes nothing else for a frozen weight."""
