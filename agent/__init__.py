"""Line side: one trigger, one verdict, within the takt. Never imports torch or trainer."""
