"""Assignment: logical experts to slots, what it is worth, and what is left of it when ranks are lost.

To understand the policy, read in this order; every module says at its top what it does and where the idea comes from.

    what is known       fleet     ranks: slots, speeds, failure domains
                        checks    loads and slots as they come in, or refused
                        trace     who chose what with whom, from recorded routing
                        links     how fast ranks reach each other, as measured
    from scratch        counts    how many copies each expert gets
                        pack      which rank holds which copy: deal, part, even
                        mirror    the same experts on fixed groups of ranks: safer, where there is room
                        hosts     exchanges that leave fewer sets of hosts: safer, in small layouts
                        affinity  experts that are chosen together on the same node
                        anew      which of these is taken
    from what there is  split     uneven shares: what can be won before anything moves
                        improve   a few slots at a time
                        naming    experts by what is known of them: how they are called decides nothing
                    align     a new layout brought near to the old one
                        carry     another number of ranks
                        replan    stay, split, improve or anew: what pays, and why
                        weigh     what a layout costs in every step: its heaviest rank, and the links
                    groups    the same where ranks hold the same in groups, and are to go on doing so
    in the data plane   parts     how much of its expert each live copy answers
                        choice    which copy a source's token goes to
                        tiers     the same for EP groups side by side: own group first
                        degrade   who answers for what was lost
    what it is worth    measure   balancedness and coverage        bounds    the best that is possible
                        survival  the chance to keep every expert   traffic   bytes of a step, exactly
                        relayed   of one that goes by node          crossing  picks between nodes, quickly
                        replay    a trace through a policy
    beside it           assign    maps by named policy: linear; EPLB's with copies apart (eplb, copies)

The operator (decide.assignment) calls groups.pack_groups for a first map, carry.carry_over for another number of ranks,
and replan, or groups.replan_groups where several copies were promised. Read shelf before pack: it says what the ids E
and E + 1 mean. Parts are whole numbers as a map has them, shares the same as fractions, weights anything in proportion.

Arrays of a plan are named by their axes: L layers, E logical experts, R ranks, S slots of the widest rank, G failure
domains; X is E and two columns more, for the empty slot and the slot that a narrow rank does not have (shelf).
"""
