"""What the robot is told: three wordings for each of Meta-World's fifty tasks, and LIBERO's own.

The first wording is the evaluation's; training draws from all three, so that the policy does not
hang on one. The names are Meta-World's own, without the version suffix. LIBERO's tasks have the one
wording of the benchmark (`libero_tasks.py`).
"""

from libero_tasks import LIBERO_INSTRUCTIONS

METAWORLD_INSTRUCTIONS = {
    "assembly": (
        "put the ring on the peg",
        "place the nut over the peg",
        "assemble the ring and the peg",
    ),
    "basketball": ("throw the ball into the hoop", "dunk the ball", "put the ball in the basket"),
    "bin-picking": (
        "move the cube to the other bin",
        "pick the cube into the bin",
        "switch the cube's bin",
    ),
    "box-close": ("close the box with the lid", "put the lid on the box", "cover the box"),
    "button-press": ("press the button", "push the button in", "press the button on the wall"),
    "button-press-topdown": (
        "press the button from above",
        "push the button down",
        "press down the red button",
    ),
    "button-press-topdown-wall": (
        "press the button behind the wall from above",
        "push the button down past the wall",
        "reach over the wall and press down the button",
    ),
    "button-press-wall": (
        "press the button behind the wall",
        "push the button past the wall",
        "reach around the wall and press the button",
    ),
    "coffee-button": (
        "press the button of the coffee machine",
        "start the coffee machine",
        "push the coffee machine's button",
    ),
    "coffee-pull": (
        "pull the mug from the coffee machine",
        "take the mug away",
        "pull the cup back",
    ),
    "coffee-push": (
        "push the mug under the coffee machine",
        "place the mug",
        "push the cup forward",
    ),
    "dial-turn": ("turn the dial", "rotate the dial", "turn the knob around"),
    "disassemble": (
        "take the ring off the peg",
        "remove the nut from the peg",
        "lift the ring off",
    ),
    "door-close": ("close the door", "push the door shut", "shut the door"),
    "door-lock": ("lock the door", "turn the lock down", "lock it"),
    "door-open": ("open the door", "pull the door open", "swing the door open"),
    "door-unlock": ("unlock the door", "turn the lock open", "unlock it"),
    "drawer-close": ("close the drawer", "push the drawer shut", "shut the drawer"),
    "drawer-open": ("open the drawer", "pull the drawer open", "pull out the drawer"),
    "faucet-close": ("close the faucet", "turn the faucet off", "shut the tap"),
    "faucet-open": ("open the faucet", "turn the faucet on", "open the tap"),
    "hammer": ("hammer the nail", "drive the nail in", "hit the nail with the hammer"),
    "hand-insert": (
        "insert the hand into the hole",
        "put the gripper in the hole",
        "reach into the hole",
    ),
    "handle-press": ("press the handle down", "push down the handle", "lower the handle"),
    "handle-press-side": (
        "press the side handle down",
        "push down the side handle",
        "lower the side handle",
    ),
    "handle-pull": ("pull the handle up", "lift the handle", "raise the handle"),
    "handle-pull-side": (
        "pull the side handle up",
        "lift the side handle",
        "raise the side handle",
    ),
    "lever-pull": ("pull the lever up", "lift the lever", "raise the lever"),
    "peg-insert-side": (
        "insert the peg into the side",
        "put the peg in the hole",
        "plug the peg in",
    ),
    "peg-unplug-side": ("unplug the peg", "pull the peg out", "take the peg out of the side"),
    "pick-out-of-hole": (
        "pick the puck out of the hole",
        "lift the puck out",
        "take the puck out of the hole",
    ),
    "pick-place": (
        "pick and place the puck",
        "bring the puck to the goal",
        "lift the puck to the target",
    ),
    "pick-place-wall": (
        "pick the puck over the wall",
        "bring the puck past the wall",
        "place it over the wall",
    ),
    "plate-slide": (
        "slide the plate into the cabinet",
        "push the plate in",
        "slide the plate forward",
    ),
    "plate-slide-back": (
        "slide the plate out of the cabinet",
        "pull the plate back",
        "slide the plate back",
    ),
    "plate-slide-back-side": (
        "slide the plate out sideways",
        "pull the plate back to the side",
        "slide the plate back to the side",
    ),
    "plate-slide-side": (
        "slide the plate sideways",
        "push the plate to the side",
        "slide the plate to the side",
    ),
    "push": (
        "push the puck to the goal",
        "push the puck to the target",
        "move the puck to the goal",
    ),
    "push-back": ("pull the puck back to the goal", "push the puck back", "move the puck back"),
    "push-wall": (
        "push the puck around the wall",
        "push the puck past the wall",
        "move the puck by the wall",
    ),
    "reach": ("reach the goal", "move the hand to the goal", "reach the red target"),
    "reach-wall": (
        "reach the goal behind the wall",
        "move the hand over the wall",
        "reach past the wall",
    ),
    "shelf-place": (
        "place the puck on the shelf",
        "put the puck on the shelf",
        "lift the puck to the shelf",
    ),
    "soccer": ("kick the ball into the goal", "push the ball into the goal", "score a goal"),
    "stick-pull": (
        "pull the box with the stick",
        "use the stick to pull",
        "hook the box with the stick",
    ),
    "stick-push": (
        "push the box with the stick",
        "use the stick to push",
        "shove the box with the stick",
    ),
    "sweep": ("sweep the puck off the table", "sweep the puck away", "push the puck off the table"),
    "sweep-into": (
        "sweep the puck into the hole",
        "push the puck into the hole",
        "sweep it into the hole",
    ),
    "window-close": ("close the window", "slide the window shut", "shut the window"),
    "window-open": ("open the window", "slide the window open", "push the window open"),
}

TASKS = tuple(METAWORLD_INSTRUCTIONS)
INSTRUCTIONS = METAWORLD_INSTRUCTIONS | LIBERO_INSTRUCTIONS
INSTRUCTION_CHARACTERS = "abcdefghijklmnopqrstuvwxyz' "
