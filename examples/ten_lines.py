"""A VM that is suspended in the middle of its work, and goes on with it."""

from capsem import Sandbox

box = Sandbox.create("ten-lines", ram_mb=512, cpus=1)
box.files.write("count.sh", "for i in 1 2 3; do sleep 0.5; echo $i; done")
counting = box.spawn("bash count.sh")  # in the background
box.suspend()  # memory and all, to disk: nothing of it runs any more
box.resume()  # and it goes on where it was
print("counted", counting.wait().stdout.split())
with_input = box.exec(["tr", "a-z", "A-Z"], input="hello\n", check=True)
print(with_input.stdout, end="")
